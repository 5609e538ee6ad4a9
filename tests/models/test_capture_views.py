"""`capture` of weights that a program reshapes, stacks and cuts, against the same layer written plainly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

X = jax.random.normal(jax.random.key(0), (5, 8))
Z = jax.random.normal(jax.random.key(1), (5, 3, 2, 4))
W = jax.random.normal(jax.random.key(2), (8, 24))


def stats(f, w, x=X):
    return jw.capture(f, {"w": w}, [x])["w"]


def plain(params, x):
    return x.reshape(-1, len(params["w"])) @ params["w"]


@pytest.mark.parametrize(
    ("f", "w", "x", "rows"),
    [
        (lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(8, 6, 4)), W, X, X),
        (lambda p, x: x @ p["w"].reshape(8, -1), W.reshape(8, 6, 4), X, X),
        (lambda p, x: x.reshape(15, 8) @ p["w"].reshape(8, 24), W.reshape(2, 4, 24), Z, Z.reshape(15, 8)),
        (lambda p, x: x @ jnp.moveaxis(p["w"], 0, 1)[..., 0], W.T[..., None], X, X),
        (lambda p, x: jnp.einsum("tsed,edf->tsf", x, p["w"].reshape(2, 4, 24)), W, Z, Z.reshape(15, 8)),
    ],
    ids=["split outputs", "joined outputs", "joined inputs", "transposed", "split inputs"],
)
def test_a_reshaped_weight_has_the_inputs_of_the_weight(f, w, x, rows):
    found, expected = stats(f, w, x), stats(plain, W, rows)
    for name in ("norm", "mean_abs", "second_moment", "count"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, err_msg=name)


def test_a_stack_under_vmap_has_statistics_of_each_layer():
    """Two layers for all of a stack; the inputs of the first are the same for all, and those of the second are not."""
    a, b = (jax.random.key(seed) for seed in (3, 4))
    params = {"a": jax.random.normal(a, (3, 8, 6)), "b": jax.random.normal(b, (3, 6, 2))}

    def mlp(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    found = jw.capture(lambda p, x: jax.vmap(mlp, (0, None))(p, x), params, [X])
    for i in range(3):
        expected = jw.capture(mlp, jax.tree.map(lambda w, i=i: w[i], params), [X])
        for path in params:
            mine = jax.tree.map(lambda a, i=i: a[i], found[path])
            chex.assert_trees_all_close(mine.second_moment, expected[path].second_moment, rtol=1e-5)
            assert mine.count == expected[path].count


def test_what_is_left_out_is_named_with_the_reason():
    params = {"kept": W, "experts": jnp.ones((3, 8, 2)), "both": jnp.ones((8, 8)), "table": jnp.ones((9, 8))}

    def f(params, x, i):
        x = x + params["table"][i]
        return x @ params["kept"], x @ params["experts"][1], x @ params["both"] @ params["both"].T

    with pytest.warns(UserWarning, match=r"capture leaves out .*'experts' .*'both' \(read in two ways") as caught:
        found = jw.capture(f, params, [(X, jnp.arange(5))])
    assert set(found) == {"kept"} and "table" not in str(caught[0].message)
    with pytest.raises(ValueError, match=r"capture found no product of data with all of 'both' \(read in two ways"):
        jw.capture(f, params, [(X, jnp.arange(5))], "both")
