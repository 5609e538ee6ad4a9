"""`ShareWeights`: learned codebooks, the axes of a stack, and what `project` keeps."""

import jax
import numpy as np
import pytest
from techniques.test_shared_patterns import normal, summed_over_members

import jaxweights as jw
from jaxweights import sharing

KINDS = {
    "values": (8, {"start": "linear"}),
    "zeros": (8, {"start": "linear", "keep_zeros": True}),
    "hashed": (sharing.Hashed(8), {}),
    "toeplitz": (sharing.Toeplitz(), {}),
    "convolution": (sharing.Convolution((3, 2, 3), (6, 2), padding="VALID"), {}),
    "sub-vectors": (sharing.ProductQuantized(3, length=4), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_codebook_starts_at_the_means_and_gets_the_gradient_of_its_members(kind):
    groups, options = KINDS[kind]
    w = normal(12, 12)
    w[:, :3] = 0
    cotangent = normal(12, 12, seed=1)

    @jax.jit
    def run(w):
        results = []
        specs = [jw.ShareWeights(groups, codebook_gradient=gradient, **options) for gradient in (None, "sum", "mean")]
        state = specs[-1].init(w, jax.random.key(0))
        for t in specs:
            learned = {n: state[n] for n in t.learned}
            new, pull = jax.vjp(lambda w, learned, t=t: t.apply(w, {**state, **learned}), w, learned)
            results.append((new, *pull(cotangent), t.store(w, state)))
        return state, results

    state, ((projected, by_w, _, stored), *learned) = run(w)
    index = np.asarray(state["index"])
    n = index.max() + 1
    members = np.bincount(index[index >= 0], minlength=n)
    means = summed_over_members(index, w, n) / np.maximum(members, 1)
    np.testing.assert_allclose(projected, np.where(index < 0, 0, means[index]), atol=1e-6)
    total = summed_over_members(index, cotangent, n)
    mean = total / np.maximum(members, 1)
    np.testing.assert_allclose(by_w, np.where(index < 0, 0, mean[index]), atol=1e-6)
    for (new, by_w, by_codebook, of_learned), expected in zip(learned, (total, mean), strict=True):
        np.testing.assert_allclose(new, projected, atol=1e-6)
        assert not np.any(by_w)
        np.testing.assert_allclose(by_codebook["codebook"][:n], expected, atol=1e-5)
        np.testing.assert_array_equal(jw.densify(of_learned), new)
    assert isinstance(stored, jw.ClusteredArray)
    np.testing.assert_allclose(stored.todense(), projected, atol=1e-6)
    if kind == "zeros":
        np.testing.assert_array_equal(np.asarray(projected) == 0, w == 0)


def test_patterns_follow_the_axes_of_a_stack():
    """Each layer of a stack has values of its own, in the matrix as which its axes read it."""
    w = normal(3, 5, 2, 4)
    axes = jw.Axes(input=-1, output=(-3, -2), batch=0)  # (layers, out, out, in)
    t = jw.ShareWeights(sharing.Toeplitz(), axes=axes)
    new = np.asarray(jax.jit(lambda w: t.apply(w, t.init(w, jax.random.key(0))))(w))
    for layer, before in zip(new.reshape(3, 10, 4), w.reshape(3, 10, 4), strict=True):
        for d in range(-9, 4):
            found, of = np.diagonal(layer, d), np.diagonal(before, d)
            np.testing.assert_allclose(found, np.full_like(found, of.mean()), atol=1e-6)


def test_what_project_keeps():
    """The mean of each group moves by the mean update; a learned codebook stays, as a learned scale does."""
    w, update = {"kernel": normal(8, 6)}, {"kernel": normal(8, 6, seed=1)}
    for gradient, steps in ((None, 1), ("sum", 0)):
        t = jw.ShareWeights(sharing.Toeplitz(), codebook_gradient=gradient)
        tx = jw.project(t, where="kernel")
        new, _ = tx.update(update, tx.init(w), w)
        expected = w["kernel"] + steps * update["kernel"]
        found = w["kernel"] + np.asarray(new["kernel"])
        for d in range(-7, 6):
            of = np.diagonal(found, d)
            np.testing.assert_allclose(of, np.full_like(of, np.diagonal(expected, d).mean()), atol=1e-6)
