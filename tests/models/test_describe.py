"""What names and shapes tell of a tree, as a layout."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxweights as jw

PARAMS = {
    "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "q_proj": {"kernel": jnp.ones((16, 2, 8), jnp.bfloat16)},
    "cls_token": jnp.ones((1, 1, 8)),
    "steps": jnp.arange(3),
}


def test_a_description_is_a_layout():
    found = jw.describe(PARAMS)
    assert dict(found) == {"dense/kernel": jw.axes.DENSE, "q_proj/kernel": jw.axes.CONV}
    assert found.skipped == {"cls_token": "a token, by its name", "dense/bias": "a vector"}
    why = {w.path: w.why for w in found.weights}
    assert why["dense/kernel"] == "by the bias beside it"
    assert why["q_proj/kernel"] == "a guess: win in out, batch in out or in out out"
    assert hash(found) == hash(jw.describe(jax.eval_shape(lambda: PARAMS)))
    assert set(jw.on_tree(jw.WeightNorm(), layout=found).selected(PARAMS)) == set(found)


def test_it_agrees_with_the_program_on_what_is_sure():
    module = eqx.nn.MLP(3, 4, 5, 2, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_array)
    program = jw.layout(lambda p, x: eqx.combine(p, static)(x), params, jnp.ones(3))
    matrices = lambda found: {p: axes.matrix(np.ones(found[0][p])).shape for p, axes in found[1].items()}
    shapes = {w.path: w.shape for w in program.weights}
    assert matrices((shapes, jw.describe(params))) == matrices((shapes, program))


def test_where_and_stored_weights():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 4)), jnp.float32)
    tree = {"q": jw.quantize(w, 8, axes=jw.axes.ATTENTION_IN), "dense": PARAMS["dense"]}
    assert jw.describe(tree)["q"].matrix(w).shape == (8, 8)
    assert list(jw.describe(tree, "dense/*")) == ["dense/kernel"]
    assert [w.path for w in jw.describe(PARAMS, lambda path, a: a.ndim == 1).weights] == ["dense/bias"]
    with pytest.raises(ValueError, match="selects no weight"):
        jw.describe(PARAMS, "**/weight")


def test_it_prints_as_a_layout_does():
    columns = []
    for found in (jw.describe(PARAMS), jw.layout(lambda p, x: x @ p["dense"]["kernel"], PARAMS, jnp.ones(4))):
        out = io.StringIO()
        Console(file=out, width=120).print(found)
        columns.append(out.getvalue().splitlines()[0].split())
        assert "dense/kernel" in out.getvalue()
    assert columns[0] == columns[1] == ["weight", "shape", "axes", "techniques", "why"]
