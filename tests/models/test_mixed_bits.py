"""Formats are chosen by measured errors within a budget: the best choice of all, for any method and distance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

BITS = (2, 3, 4, 8)


def mlp(params, x):
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return {"logits": x @ params["head"], "step": jnp.int32(3)}


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    layers = [{"w": rng.normal(size=s), "b": rng.normal(size=s[1])} for s in ((16, 24), (24, 32), (32, 8))]
    params = {"layers": layers, "head": rng.normal(size=(8, 4))}
    batches = [jnp.float32(rng.normal(size=(n, 16))) for n in (32, 32)]
    return jax.tree.map(jnp.float32, params), batches


PATHS = ("head", "layers/0/w", "layers/1/w", "layers/2/w")


def replaced(params, path, bits):
    """The parameters with one weight rounded."""
    layers = [dict(layer) for layer in params["layers"]]
    new = {"layers": layers, "head": params["head"]}
    place = new if path == "head" else layers[int(path.split("/")[1])]
    name = path.split("/")[-1]
    place[name] = jw.dequantize(jw.quantize(place[name], bits))
    return new


def errors(params, batches):
    """{path: errors by bits}, in float64."""
    each = {}
    for path, bits in itertools.product(PATHS, BITS):
        of_batches = []
        for x in batches:
            y, z = (np.asarray(mlp(p, x)["logits"], np.float64) for p in (params, replaced(params, path, bits)))
            of_batches.append(np.sum((y - z) ** 2) / np.sum(y**2))
        each.setdefault(path, []).append(np.mean(of_batches))
    return each


def test_the_choice_is_the_best_of_all(model):
    params, batches = model
    expected = errors(params, batches)
    weights = dict(zip(PATHS, [params["head"], *(layer["w"] for layer in params["layers"])], strict=True))
    for budget in (4.0, 5.5):
        found = jw.mixed_bits(mlp, params, batches, BITS, bits=budget)
        by_path = {choice.path: choice for choice in found.choices}
        assert by_path.keys() == set(PATHS)
        for path, choice in by_path.items():
            np.testing.assert_allclose([o.error for o in choice.options], expected[path], rtol=0.01)
            assert [o.nbytes for o in choice.options] == [jw.quantize(weights[path], b).nbytes for b in BITS]
        room = budget * sum(w.size for w in weights.values()) / 8
        best = min(
            sum(expected[p][i] for p, i in zip(PATHS, choice, strict=True))
            for choice in itertools.product(range(len(BITS)), repeat=len(PATHS))
            if sum(by_path[p].options[i].nbytes for p, i in zip(PATHS, choice, strict=True)) <= room
        )
        assert found.nbytes <= room
        assert found.error == pytest.approx(best, rel=0.01)
        one_format = [b for i, b in enumerate(BITS) if sum(c.options[i].nbytes for c in found.choices) <= room]
        assert found.error < sum(expected[p][BITS.index(one_format[-1])] for p in PATHS)
    new = jw.one_shot(params, found.rules, layout=jw.layout(mlp, params, batches[0]))
    assert sum(new["layers"][i]["w"].nbytes for i in range(3)) + new["head"].nbytes == found.nbytes
    assert new["head"].format.grid.bits == by_path["head"].option.method.format


def test_the_table_shows_paths_forms_bytes_and_errors(model):
    params, batches = model
    found = jw.mixed_bits(mlp, params, batches[:1], ["int4", "nf4", jw.methods.RoundToNearest(8)], nbytes=1500)
    lines = str(found).splitlines()
    for choice in found.choices:
        (line,) = (line for line in lines if line.startswith(choice.path))
        assert found.labels[choice.chosen] in line
        assert f"{choice.option.nbytes / 1000:,.1f}" in line
        assert f"{choice.option.error:.1e}" in line
    assert f"{found.nbytes / 1000:,.1f}" in lines[-1]
    assert found.nbytes <= 1500


def test_methods_with_statistics_another_distance_and_some_weights(model):
    params, batches = model

    def divergence(old, new):
        p, q = (jax.nn.log_softmax(y["logits"]) for y in (old, new))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    methods = [jw.methods.Wanda(0.5), (jw.methods.Wanda((2, 4)), jw.methods.Pack()), jw.methods.RoundToNearest(4)]
    found = jw.mixed_bits(mlp, params, batches[:1], methods, bits=32, distance=divergence, where="layers/*/w")
    assert [choice.path for choice in found.choices] == ["layers/0/w", "layers/1/w", "layers/2/w"]
    (x,) = batches[:1]
    stats = jw.capture(mlp, params, [x])
    new = jw.one_shot(params, jw.methods.Wanda(0.5), stats, where="layers/1/w")
    expected = divergence(mlp(params, x), mlp(new, x))
    np.testing.assert_allclose(found.choices[1].options[0].error, expected, rtol=1e-4)
    assert all(choice.option.error == min(o.error for o in choice.options) for choice in found.choices)


def test_what_is_stored_already_is_not_chosen_for(model):
    params, batches = model
    stored = params | {"head": jw.quantize(params["head"], 2)}
    found = jw.mixed_bits(jw.with_stored(mlp), stored, batches, BITS, bits=6)
    assert [choice.path for choice in found.choices] == ["layers/0/w", "layers/1/w", "layers/2/w"]
    expected = errors(jw.densify(stored), batches)
    for choice in found.choices:
        np.testing.assert_allclose([o.error for o in choice.options], expected[choice.path], rtol=1e-4)
