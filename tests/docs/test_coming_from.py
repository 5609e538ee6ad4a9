"""Every line of "Coming from other libraries": what their code and ours do is the same.

Flax and optax always run; torch where it is installed; the others are compared with a formula.
"""

import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw

DOCS = Path(__file__).parents[2] / "docs"
sys.path.append(str(DOCS))

from coming_from import LIBRARIES  # noqa: E402

KEY = jax.random.key(0)
W = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
GRADS = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
LARGE = (300, 200)
"""The shape of what is drawn, where its standard deviation is compared."""
OURS = {"jw": jw, "nn": nn, "nnx": nnx, "optax": optax, "functools": functools, "rngs": nnx.Rngs(0), "w": W, "x": X}


def larger_half(w):
    return np.where(abs(w) >= np.sort(abs(w), None)[w.size // 2], w, 0)


def nearest(w, peak):
    scale = abs(w).max(0) / peak
    return np.round(w / scale) * scale


def nearest_nf4(w):
    values, scale = np.array(jw.formats.NF4.grid.values, np.float32), abs(w).max(0)
    return values[abs(w / scale - values[:, None, None]).argmin(0)] * scale


ORACLES = {"np": np, "larger_half": larger_half, "nearest": nearest, "nearest_nf4": nearest_nf4}


def transformed(transform, w):
    """What a transform makes of a weight after an update, or after as many as its estimate takes to settle."""

    @jax.jit
    def run(w, grad):
        n = 10 if isinstance(transform, jw.SpectralNorm) else 1
        update = lambda _, state: transform.update(w, state, grad)
        return transform.apply(w, jax.lax.fori_loop(0, n, update, transform.init(w, KEY)))

    return run(w, GRADS if w.shape == W.shape else jnp.ones_like(w))


def result(value, line):
    """What a piece of code does: an array."""
    if isinstance(value, jw.Transform):
        return transformed(value, jnp.array(W if "8 inputs" not in line.note else np.vstack([W, GRADS[:2]])))
    if isinstance(value, optax.GradientTransformation):
        params = {"dense": {"kernel": jnp.array(W), "bias": jnp.ones(4)}}
        grads = {"dense": {"kernel": jnp.array(GRADS), "bias": jnp.ones(4)}}
        step = jax.jit(lambda p: optax.apply_updates(p, value.update(grads, value.init(p), p)[0]))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(step(params))])
    if isinstance(value, nnx.Module):
        return value(X)
    if isinstance(value, nn.Module):
        return linen_result(value, line)
    if isinstance(value, jw.QuantizedArray):
        return value.todense()
    if callable(value):  # an initializer
        return value(KEY, LARGE if line.same == "std" else W.shape)
    return jnp.asarray(value)


def linen_result(module, line):
    """The outputs of a Linen module whose kernel is W, or its matrix, after steps for its estimate to settle."""
    steps = {"update_stats": True} if isinstance(module, nn.SpectralNorm) else {}
    variables = jax.jit(functools.partial(module.init, **steps))(KEY, X)
    params = jax.tree.map(lambda w: jnp.array(W) if w.shape == W.shape else w, variables["params"])
    call = jax.jit(lambda variables, x: module.apply(variables, x, mutable=True, **steps))
    variables, x = {**variables, "params": params}, np.eye(6, dtype=np.float32) if line.same == "singular values" else X
    for _ in range(30 if line.same == "singular values" else 1):
        y, moved = call(variables, x)
        variables = {**variables, **moved, "params": params}
    return y


def in_torch(line, torch):
    """What the code of a line makes of a layer, as a kernel (in, out), or returns."""
    from torch.nn.utils import parametrizations, prune

    shape = LARGE if line.same == "std" else W.shape
    m = torch.nn.Linear(*shape, bias=False)
    if line.same != "std":
        m.weight.data = torch.tensor(W.T.copy())
    namespace = {"m": m, "x": torch.tensor(X), "torch": torch, "prune": prune, "parametrizations": parametrizations}
    namespace |= {"F": torch.nn.functional} | {name: f for name, f in vars(torch.nn.init).items() if name.endswith("_")}
    torch.manual_seed(0)
    value = eval(line.theirs, namespace)
    if isinstance(value, torch.Tensor) and line.theirs.startswith("F."):
        return value.numpy()
    return (value if isinstance(value, torch.Tensor) else m.weight).detach().numpy().T


def theirs(library, line):
    if line.formula:
        w = W if "8 inputs" not in line.note else np.vstack([W, GRADS[:2]])
        return np.asarray(eval(line.formula, ORACLES | {"w": w}))
    if library.startswith("torch"):
        return in_torch(line, pytest.importorskip("torch"))
    return result(eval(line.theirs, OURS | {"rngs": nnx.Rngs(0)}), line)


CASES = [
    pytest.param(library, line, id=f"{library}: {line.theirs}")
    for library, lines in LIBRARIES.items()
    for line in lines
]


@pytest.mark.parametrize(("library", "line"), CASES)
def test_a_line_does_the_same(library, line):
    there, here = np.array(theirs(library, line)), np.array(result(eval(line.ours, OURS), line))
    if line.same == "std":
        assert here.std() == pytest.approx(there.std(), rel=0.03)
    elif line.same == "singular values":
        there, here = (np.linalg.svd(a.reshape(-1, a.shape[-1]), compute_uv=False) for a in (there, here))
        np.testing.assert_allclose(here, there, rtol=2e-3)
    elif line.same == "number of zeros":
        assert (here == 0).sum() == (there == 0).sum() > 0
    elif line.same == "number of values":
        assert np.unique(here).size == there.size
    else:
        np.testing.assert_allclose(here, there, rtol=2e-4, atol=2e-6)
