"""Every case of `cases.py` runs sharded on a mesh without gathering a weight."""

import math
import re

import jax
import pytest
from cases import KEY
from contract.table import close, each_kind, same_state, sharding, weight
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw


def gathered(hlo):
    """Number of elements of each all-gather in a compiled program."""
    found = re.findall(r"= (\([^)]*\)|\S+) all-gather(?:-start)?\(", hlo)
    shapes = [s for result in found for s in re.findall(r"\[([\d,]*)\]", result)]
    return [math.prod(int(d) for d in s.split(",") if d) for s in shapes]


REMADE = {"prune schedule", "prune global", "regrow"}
"""Cases that recompute their masks in some steps."""


@each_kind
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_no_weight_is_gathered(case, kind):
    if case.name == "spectral_normalize exact":
        pytest.skip("an exact SVD needs the whole matrix on one device: SpectralNorm is the sharded one")
    if case.name == "cluster":
        pytest.skip("up to 16,384 entries are sorted, on one device: test_clustering.py has a large weight")
    if case.name == "cluster per unit":
        pytest.skip("the entries of a unit are sorted on one device: test_clustering.py has whole units")
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    w = weight(case)
    placed = jax.device_put(w, sharding(mesh, case.shape))
    if case.transform is None:
        compiled = jax.jit(case.call, out_shardings=placed.sharding).lower(placed).compile()
        new, expected = compiled(placed), jax.jit(case.call)(w)
    else:
        lifted = jw.on_tree(case.transform(), where="*")
        params = {"a_kernel": w, "b_kernel": w[::-1]}
        state = jax.jit(lifted.init)(params, KEY)
        run = lambda params, state: lifted.apply(params, lifted.update(params, state))
        same_state(
            case, lifted, params, jax.device_get(lifted.init(jax.device_put(params, placed.sharding), KEY)), state, 1e-4
        )
        place = lambda a: jax.device_put(
            a, sharding(mesh, a.shape) if a.shape == case.shape else NamedSharding(mesh, PartitionSpec())
        )
        out = jax.tree.map(lambda _: placed.sharding, params)
        arguments = jax.tree.map(place, (params, state))
        compiled = jax.jit(run, out_shardings=out).lower(*arguments).compile()
        new, expected = compiled(*arguments), jax.jit(run)(params, state)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), new, expected)
    if kind == "Explicit" and case.name in REMADE and jax.__version_info__ < (0, 8):
        pytest.skip("jax 0.7 gathers a weight where a mask is remade in a loop, on a mesh of explicit axes")
    assert all(n < w.size / 2 for n in gathered(compiled.as_text())), gathered(compiled.as_text())


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_that_are_sharded_differently_are_not_gathered_either(kind):
    """Weights of the same shape are stacked for the update only if their shardings match."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    names = [f"layer_{i}/{role}" for i in range(2) for role in ("query", "out")]
    params = {n: jax.random.normal(jax.random.key(i), (64, 64)) for i, n in enumerate(names)}
    specs = {n: PartitionSpec(*(("x", "y") if "query" in n else ("y", "x"))) for n in names}
    placed = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params.items()}
    lifted = jw.on_tree(jw.SpectralNorm())
    state = lifted.init(params, KEY)
    compiled = jax.jit(lifted.update).lower(placed, state).compile()
    on_mesh, off_mesh = (
        lifted.apply(params, s) for s in (jax.device_get(compiled(placed, state)), lifted.update(params, state))
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-4), on_mesh, off_mesh)
    assert all(n < 64 * 64 / 2 for n in gathered(compiled.as_text()))
