"""What is done to a whole model before and after it is quantized."""

import functools

import jax.numpy as jnp
from bad_input.vocabulary import T, V, W

import jaxweights as jw

PARAMS = {"encoder": {"kernel": W, "bias": W[0]}, "head": W.T}
X = W.T


@functools.cache
def stored():
    return {**PARAMS, "head": jw.quantize(W.T, 8)}


def linear(params, x):
    return x @ params["encoder"]["kernel"] + params["encoder"]["bias"]


def mlp(params, x):
    return jnp.maximum(linear(params, x), 0) @ params["head"]


def bent(params, x):
    return jnp.exp(linear(params, x)) @ params["head"]


def correct(f=linear, new=PARAMS, batches=(X,)):
    return jw.correct_biases(f, PARAMS, new, batches)


def mixed(candidates=(2, 4), f=mlp, batches=(X,), **budget):
    return jw.mixed_bits(f, PARAMS, batches, candidates, **(budget or {"bits": 16}))


CASES = [
    ("biases no function", lambda: jw.correct_biases("model", PARAMS, PARAMS, [X]), T, "wrap the model in one"),
    ("biases no batch", lambda: correct(batches=[]), V, "give at least one batch"),
    ("biases one batch", lambda: correct(batches=X), T, "write [batch]"),
    ("biases of another tree", lambda: correct(new={"head": W}), V, "only one of them has"),
    ("biases of other shapes", lambda: correct(new={**PARAMS, "head": W}), V, "pass the tree it was made from"),
    ("biases of a dtype", lambda: correct(new={**PARAMS, "head": W.T.astype(jnp.bfloat16)}), V, "has bfloat16(6, 4)"),
    ("biases, none", lambda: correct(lambda p, x: x @ p["encoder"]["kernel"]), V, "there is no bias to correct"),
    ("biases, another use", lambda: correct(lambda p, x: linear(p, x) * p["encoder"]["bias"]), V, "no bias to correct"),
    ("equalize no function", lambda: jw.equalize(PARAMS, PARAMS, X), T, "wrap the model in one"),
    ("equalize stored", lambda: jw.equalize(mlp, stored(), X), T, "scale arrays, and store them afterwards"),
    ("equalize one layer", lambda: jw.equalize(linear, PARAMS, X), V, "no units that can be scaled: it is returned"),
    ("equalize exp", lambda: jw.equalize(bent, PARAMS, X), V, "exp lies on the way"),
    ("equalize no layer", lambda: jw.equalize(lambda p, x: x, PARAMS, X), V, "no weight reads what another one makes"),
    ("smooth no function", lambda: jw.smooth("model", PARAMS, [X]), T, "wrap the model in one"),
    ("smooth stored", lambda: jw.smooth(mlp, stored(), [X]), T, "scale arrays, and store them afterwards"),
    ("smooth alpha > 1", lambda: jw.smooth(mlp, PARAMS, [X], 1.5), V, "alpha must be in [0, 1]"),
    ("smooth alpha as text", lambda: jw.smooth(mlp, PARAMS, [X], "0.5"), T, "alpha must be"),
    ("smooth one batch", lambda: jw.smooth(mlp, PARAMS, X), T, "write [batch]"),
    ("smooth no batch", lambda: jw.smooth(mlp, PARAMS, []), V, "give at least one batch"),
    ("smooth exp", lambda: jw.smooth(bent, PARAMS, [X]), V, "exp lies on the way"),
    ("mixed no function", lambda: jw.mixed_bits("model", PARAMS, [X], [4], bits=4), T, "wrap the model in one"),
    ("mixed one candidate", lambda: mixed(4), T, "write [3, 4, 8]"),
    ("mixed a name", lambda: mixed("nf4"), T, "write [3, 4, 8]"),
    ("mixed no candidate", lambda: mixed([]), V, "give formats or methods to choose from"),
    ("mixed 9 bits", lambda: mixed([9]), V, "from 2 to 8, got 9"),
    ("mixed an unknown name", lambda: mixed(["int9"]), V, "'int9'"),
    ("mixed a class", lambda: mixed([[jw.methods.Wanda]]), T, "make an instance, Wanda(...)"),
    ("mixed no budget", lambda: mixed(bits=None), V, "give the budget once"),
    ("mixed two budgets", lambda: mixed(bits=4, nbytes=100), V, "give the budget once"),
    ("mixed budget of bits", lambda: mixed(bits=-1), V, "bits must be at least 0"),
    ("mixed budget of bytes", lambda: mixed(nbytes=1e3), T, "nbytes must be an integer"),
    ("mixed budget too small", lambda: mixed(nbytes=3), V, "bytes, the budget is 3: raise it"),
    ("mixed no batch", lambda: mixed(batches=[]), V, "give at least one batch"),
    ("mixed one batch", lambda: mixed(batches=X), T, "write [batch]"),
    ("mixed distance", lambda: mixed(bits=8, distance="KL"), T, "must be a function (outputs, new outputs)"),
    ("mixed where", lambda: mixed(bits=8, where="**/w"), V, "selects no weight"),
    (
        "mixed where stored",
        lambda: jw.mixed_bits(jw.with_stored(mlp), stored(), [X], [4], bits=8, where="head"),
        V,
        "make arrays of what is stored with jaxweights.densify(params)",
    ),
    ("MixedBits as rules", lambda: jw.one_shot(PARAMS, jw.MixedBits((), ())), T, "rules {glob: method}, got MixedBits"),
]
