"""Programs written out and cut into stages compute what they did."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.programs.stages import cut
from jaxweights.programs.unroll import Piece, unroll

W = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 4)))
B = jnp.float32(np.random.default_rng(1).normal(size=(2, 3, 4)))
X = jnp.float32(np.random.default_rng(2).normal(size=(5, 4)))


@jax.jit
def nested(w, b, head, x):
    """Layers in groups; the inner loop runs backwards, and all activations come out."""

    def inner(x, layer):
        w, b = layer
        x = jax.nn.relu(x @ w) + b
        return x, x.sum(1)

    def outer(x, group):
        return jax.lax.scan(jax.checkpoint(inner), x, group, reverse=True)

    x, sums = jax.lax.scan(outer, x, (w, b))
    return jnp.tanh(x @ head), sums


def pieces_of(arrays, pieces):
    return [arrays[p.place][p.layer] for p in pieces]


def test_loops_over_layers_are_written_out():
    arguments = W, B, W[0, 0], X
    program, pieces = unroll(jax.make_jaxpr(nested)(*arguments), {0, 2}, 3)
    layers = [(i, j) for i in range(2) for j in range(3)]
    assert [p for p in pieces if p.place == 0] == [Piece(0, layer) for layer in layers]
    assert [p for p in pieces if p.place == 1] == [Piece(1, layer) for layer in layers]
    assert "scan" not in str(program) and "remat" not in str(program)
    outs = jax.jit(jax.extend.core.jaxpr_as_fun(program))(*pieces_of(arguments, pieces))
    for got, expected in zip(outs, nested(*arguments), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_stack_that_is_used_whole_stays_a_loop():
    def f(w, x):
        return nested(w, B, w.mean((0, 1)), x)

    program, pieces = unroll(jax.make_jaxpr(f)(W, X), {0}, 1)
    assert pieces == [Piece(0), Piece(1)] and str(program).count("scan") == 2


def test_stages_lead_to_the_outputs():
    """Each stage holds the products of one layer; those of all layers but the outermost are equal programs."""
    arguments = W, B, W[0, 0], X
    program, pieces = unroll(jax.make_jaxpr(nested)(*arguments), {0, 2}, 3)
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.invars, pieces_of(arguments, pieces), strict=True))
    weights = [v for v, p in zip(jaxpr.invars, pieces, strict=True) if p.place in (0, 2)]
    data = [v for v, p in zip(jaxpr.invars, pieces, strict=True) if p.place == 3]
    stages = cut(jaxpr, weights, data)
    assert len(stages) == 7 and len({s for s in stages[1:-1]}) == 1
    assert len({s.fixed[i] for s in stages for i in s.uses}) == 7
    for stage in stages:
        outs = stage([values[v] for v in stage.fixed], [values[v] for v in stage.live])
        values |= zip(stage.out, outs, strict=True)
    # The last stage has the product with the head; what it starts from is the output of the last layer.
    x = np.float64(X)
    for w, b in zip(np.float64(W)[:, ::-1].reshape(6, 4, 4), np.float64(B)[:, ::-1].reshape(6, 4), strict=True):
        x = np.maximum(x @ w, 0) + b
    (before,) = (values[v] for v in stages[-2].out)
    np.testing.assert_allclose(np.maximum(before, 0) + B[-1, 0], x, rtol=1e-4, atol=1e-5)
