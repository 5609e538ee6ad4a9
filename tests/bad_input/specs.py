"""Transforms, axes, indices and initializers with invalid arguments raise on construction."""

import math

import jax
import jax.numpy as jnp
from bad_input.vocabulary import CALLABLE, INTEGER, KEY, NAN, NUMBER, SCALAR, SHAPE, WRITE_AXES, T, V

import jaxweights as jw

init = jw.initializers


def initialize(name, options):
    options = {"shape": (2, 3), **options}
    return getattr(init, name)(KEY, **options)


CASES = [
    ("ClipWeights < 0", lambda: jw.ClipWeights(-1.0), V, "limit must be at least 0, got -1.0"),
    ("ClipWeights NaN", lambda: jw.ClipWeights(math.nan), V, NAN),
    ("ClipWeights string", lambda: jw.ClipWeights("1"), T, NUMBER),
    ("ClipWeights vector", lambda: jw.ClipWeights(jnp.ones(3)), V, SCALAR),
    ("ClipNorm < 0", lambda: jw.ClipNorm(-1.0), V, "max_norm must be at least 0"),
    ("ClipNorm None", lambda: jw.ClipNorm(None), T, NUMBER),
    ("ClipSingularValues < 0", lambda: jw.projections.ClipSingularValues(-1.0), V, "limit must be at least 0"),
    ("Orthogonalize gain", lambda: jw.projections.Orthogonalize(gain="1"), T, NUMBER),
    ("Orthogonalize 0", lambda: jw.projections.Orthogonalize(n_steps=0), V, "n_steps must be at least 1"),
    ("ClipRange NaN", lambda: jw.projections.ClipRange(math.nan), V, NAN),
    ("ClipRange None", lambda: jw.projections.ClipRange(None), T, NUMBER),
    ("ClipRange swapped", lambda: jw.projections.ClipRange(1.0, 0.0), V, "swap them"),
    ("BoundNorm < 0", lambda: jw.projections.BoundNorm(-1.0, 1.0), V, "low must be at least 0"),
    ("BoundNorm swapped", lambda: jw.projections.BoundNorm(1.0, 0.0), V, "swap them"),
    ("BoundNorm rate", lambda: jw.projections.BoundNorm(1.0, 1.0, -1.0), V, "rate must be in [0, 1], got -1.0"),
    ("Simplex < 0", lambda: jw.projections.Simplex(-1.0), V, "total must be at least 0"),
    ("L1Sphere -1", lambda: jw.projections.L1Sphere(-1.0), V, "radius must be at least 0"),
    ("BoundSum range", lambda: jw.projections.BoundSum(1.0, 0.0), V, "swap them"),
    ("BoundSum's normal '1'", lambda: jw.projections.BoundSum(normal="1"), T, "pass an array or nested tuples"),
    ("BoundSum's normal in steps", lambda: jw.projections.BoundSum(normal=((1.0,), (1.0, 2.0))), T, "of one length"),
    ("BoundSum's normal NaN", lambda: jw.projections.BoundSum(normal=(1.0, math.nan)), V, NAN),
    (
        "BoundSum's normal under jit",
        lambda: jax.jit(lambda a: jw.projections.BoundSum(normal=a).apply(a, {}))(jnp.ones(3)),
        T,
        "use bound_sum",
    ),
    (
        "BoundSum's normal and w",
        lambda: jw.projections.BoundSum(normal=(1.0, 2.0)).apply(jnp.ones(3), {}),
        V,
        "normal must broadcast to w (3,), got shape (2,)",
    ),
    ("L1Ball NaN", lambda: jw.projections.L1Ball(math.nan), V, NAN),
    ("Around 3", lambda: jw.Around(3), T, "Around needs a jaxweights.Transform, got int"),
    ("Around a class", lambda: jw.Around(jw.ClipWeights), T, "make an instance, ClipWeights(...)"),
    ("Sparsify < 0", lambda: jw.Sparsify(-1.0), V, "threshold must be at least 0"),
    ("Prune 1.5", lambda: jw.Prune(1.5), V, "sparsity must be in [0, 1], got 1.5"),
    ("Prune 50", lambda: jw.Prune(50), V, "sparsity must be in [0, 1], got 50"),
    ("Prune list", lambda: jw.Prune([0.5]), T, NUMBER),
    ("FakeQuantize 0", lambda: jw.FakeQuantize(0), V, "bits must be from 1 to 16, got 0"),
    ("FakeQuantize 33", lambda: jw.FakeQuantize(33), V, "bits must be from 1 to 16, got 33"),
    ("FakeQuantize 1.5", lambda: jw.FakeQuantize(1.5), T, INTEGER),
    ("FakeQuantize axes", lambda: jw.FakeQuantize(4, axes=jw.Axes()), V, "give per_unit=True too"),
    ("FakeQuantize True", lambda: jw.FakeQuantize(True), T, INTEGER),
    ("WeightNorm '0'", lambda: jw.WeightNorm(scale="0"), T, NUMBER),
    ("WeightStandardization '1'", lambda: jw.WeightStandardization("1"), T, NUMBER),
    ("WeightStandardization eps", lambda: jw.WeightStandardization(eps=math.nan), V, NAN),
    ("WeightStandardization schedule", lambda: jw.WeightStandardization(lambda step: 1.0), T, CALLABLE),
    ("SpectralNorm 0", lambda: jw.SpectralNorm(0), V, "n_steps must be at least 1"),
    ("SpectralNorm target", lambda: jw.SpectralNorm(target=-1.0), V, "target must be at least 0"),
    ("SpectralNorm 1.0", lambda: jw.SpectralNorm(1.0), T, INTEGER),
    ("ShareWeights 0", lambda: jw.ShareWeights(0), V, "n must be from 1 to"),
    ("ShareWeights seed", lambda: jw.ShareWeights(2, seed=-1), V, "seed must be at least 0"),
    ("Chain()", lambda: jw.Chain(), V, "Chain(t1, t2, ...)"),
    ("Chain(3)", lambda: jw.Chain(3), T, "Chain needs a jaxweights.Transform, got int"),
    ("Chain([...])", lambda: jw.Chain([jw.ClipWeights(1.0)]), T, "Chain needs a jaxweights.Transform, got list"),
    ("Chain of a class", lambda: jw.Chain(jw.SpectralNorm), T, "make an instance, SpectralNorm(...)"),
    ("Axes 1.5", lambda: jw.Axes(input=1.5), T, "name axes as in (0, 1)"),
    ("Axes string", lambda: jw.Axes(output="out"), T, "name axes as in (0, 1)"),
    ("Axes True", lambda: jw.Axes(batch=True), T, "name axes as in (0, 1)"),
    ("Axes None", lambda: jw.Axes(input=None), T, "name axes as in (0, 1)"),
    ("groups 0", lambda: jw.Axes(groups=0), V, "groups must be at least 1"),
    ("groups 2.0", lambda: jw.Axes(groups=2.0), T, INTEGER),
    ("stacked at -1", lambda: jw.Axes().stacked(-1), V, "axis must be at least 0"),
    ("stacked at '0'", lambda: jw.Axes().stacked("0"), T, INTEGER),
    ("stacked from the front", lambda: jw.Axes(0, 1).stacked(), V, "counted from the end (negative)"),
    ("matrix of a tree", lambda: jw.axes.DENSE.matrix({"a": jnp.ones((2, 3))}), T, "for a tree use jax.tree.map"),
    ("fans of a tree", lambda: jw.axes.fans({"a": jnp.ones((2, 3))}), T, "got dict: write (2, 3)"),
    ("infer_axes of a list", lambda: jw.axes.infer_axes([jnp.ones((2, 3))]), T, "got list: pass {path: shape}"),
    ("infer_axes of a list in a dict", lambda: jw.axes.infer_axes({"a": [jnp.ones(2)]}), T, "got list at 'a'"),
    ("infer_axes of a number", lambda: jw.axes.infer_axes({"a": 3}), T, "got int at 'a': pass {path: shape}"),
    ("fans of an integer", lambda: jw.axes.fans(5), T, SHAPE),
    ("fans of floats", lambda: jw.axes.fans((2.0, 3)), T, INTEGER),
    ("fans < 0", lambda: jw.axes.fans((-1, 3)), V, "each size in shape must be at least 0"),
    ("fans with a tuple", lambda: jw.axes.fans((2, 3), (0, 1)), T, WRITE_AXES),
    *(
        (f"{name} {what}", lambda name=name, args=args: getattr(jw.initializers, name)(KEY, *args), error, remedy)
        for name in ("xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "lecun_normal", "lecun_uniform")
        for what, args, error, remedy in [
            ("dtype int", ((2, 3), int), T, "use jnp.float32"),
            ("dtype complex", ((2, 3), jnp.complex64), T, "use jnp.float32"),
            ("dtype None", ((2, 3), None), T, "use jnp.float32"),
            ("without inputs", ((0, 3),), V, "a weight without inputs has no scale"),
            ("shape 3", (3,), T, SHAPE),
        ]
    ),
    *(
        (f"{name} {what}", lambda name=name, args=args: getattr(init, name)(KEY, *args), error, remedy)
        for name in ("zeros", "ones", "normal", "truncated_normal", "uniform", "orthogonal", "identity", "dirac")
        for what, args, error, remedy in [
            ("dtype int", ((2, 3), int), T, "use jnp.float32"),
            ("shape 3", (3,), T, SHAPE),
        ]
    ),
    *(
        (f"{name} {options}", lambda name=name, options=options: initialize(name, options), error, remedy)
        for name, options, error, remedy in [
            ("constant", {"value": "0"}, T, NUMBER),
            ("constant", {"value": jnp.ones(3)}, V, SCALAR),
            ("normal", {"std": -1.0}, V, "std must be at least 0"),
            ("normal", {"mean": None}, T, NUMBER),
            ("uniform", {"low": 1.0, "high": 0.0}, V, "low must be at most high, got 1.0 and 0.0: swap them"),
            ("truncated_normal", {"low": 3.0}, V, "low must be at most high"),
            ("truncated_normal", {"low": 2.0}, V, "for one value use constant"),
            ("truncated_normal", {"std": math.nan}, V, NAN),
            ("variance_scaling", {"scale": -1.0}, V, "scale must be at least 0"),
            ("variance_scaling", {"mode": "in"}, V, "mode must be one of 'fan_in', 'fan_out', 'fan_avg'"),
            ("variance_scaling", {"distribution": "cauchy"}, V, "distribution must be one of 'normal',"),
            ("xavier_normal", {"gain": "relu"}, T, NUMBER),
            ("xavier_uniform", {"gain": jnp.ones(3)}, V, SCALAR),
            ("he_normal", {"negative_slope": "0"}, T, NUMBER),
            ("he_uniform", {"mode": "fan"}, V, "mode must be one of"),
            ("orthogonal", {"gain": None}, T, NUMBER),
            ("orthogonal", {"axes": (0, 1)}, T, WRITE_AXES),
            ("identity", {"axes": jw.Axes(input=(), output=0)}, V, "use dirac for a convolution"),
            ("dirac", {"axes": jw.Axes(2)}, V, "use axes from -2 to 1"),
            ("delta_orthogonal", {"shape": (3, 4, 2)}, V, "cannot preserve norms: use orthogonal"),
            ("sparse", {"sparsity": 2.0}, V, "sparsity must be in [0, 1], got 2.0"),
            ("sparse", {"sparsity": 0.5, "std": -1.0}, V, "std must be at least 0"),
            ("fixup", {"n_branches": 0, "n_layers": 2}, V, "n_branches must be at least 1"),
            ("fixup", {"n_branches": 4, "n_layers": 1}, V, "n_layers must be at least 2"),
            ("fixup", {"n_branches": 4.0, "n_layers": 2}, T, INTEGER),
        ]
    ),
    ("gain by an unknown name", lambda: init.gain("softmax"), V, "activation must be one of 'linear', 'conv1d',"),
    ("gain with a slope", lambda: init.gain("relu", 0.2), V, 'slope belongs to "leaky_relu"'),
    ("gain with a slope '0'", lambda: init.gain("leaky_relu", "0"), T, NUMBER),
    ("gain of a number", lambda: init.gain(2), T, "pass one such as jax.nn.gelu"),
    ("gain of zero", lambda: init.gain(jnp.zeros_like), V, "it has no gain"),
    ("mup of a number", lambda: init.mup((4, 4), 4), T, SHAPE),
    ("mup of two ranks", lambda: init.mup((4, 4), (2, 2, 2)), V, "the same model at another width"),
    ("mup of another depth", lambda: init.mup((3, 4, 4), (2, 4, 4), axes=jw.Axes(batch=0)), V, "as many layers"),
    ("mup without inputs", lambda: init.mup((4, 4), (0, 4)), V, "without inputs or outputs has no scale"),
    ("no initializer", lambda: jw.initializers.glorot, AttributeError, "no attribute 'glorot'"),
    ("initializer axes", lambda: jw.he_normal(KEY, (2, 3), axes=jw.Axes(2)), V, "use axes from -2 to 1"),
    ("conv channels", lambda: jw.conv_index((3, 3, 2, 4), (8, 8, 3)), V, "(*window, in, out) and (*space, in)"),
    ("conv ranks", lambda: jw.conv_index((3, 2, 4), (8, 8, 2)), V, "(*window, in, out) and (*space, in)"),
    ("conv of too little", lambda: jw.conv_index((3,), ()), V, "(*window, in, out) and (*space, in)"),
    ("conv shape 3", lambda: jw.conv_index(3, (8, 1)), T, SHAPE),
    ("conv floats", lambda: jw.conv_index((3.0, 1, 1), (8, 1)), T, INTEGER),
    ("conv padding", lambda: jw.conv_index((3, 1, 1), (8, 1), padding="FULL"), V, '"SAME", "VALID", "CIRCULAR" or'),
    ("conv padding 1", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=1), V, "(before, after) for each"),
    ("conv padding [1]", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[1]), V, "(before, after) for each"),
    ("conv paddings", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[(1, 1)] * 2), V, "each of 1 axes"),
    ("conv padding .5", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[(0.5, 1)]), V, "must be integers"),
    ("conv stride 0", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=0), V, "strides must be at least 1"),
    ("conv stride 1.5", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=1.5), T, INTEGER),
    ("conv strides", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=(1, 1)), V, "or one per axis"),
    ("conv too wide", lambda: jw.conv_index((9, 1, 1), (8, 1), padding="VALID"), V, "does not fit in (8,)"),
    ("conv around itself", lambda: jw.conv_index((9, 1, 1), (8, 1), padding="CIRCULAR"), V, "use a smaller window"),
    ("ConvSpectralNorm 0", lambda: jw.ConvSpectralNorm((8, 1), 0), V, "n_steps must be at least 1"),
    ("ConvSpectralNorm shape", lambda: jw.ConvSpectralNorm(8), T, SHAPE),
    ("hash of 0", lambda: jw.hash_index((3,), 0), V, "n must be from 1 to"),
    ("hash of 2.0", lambda: jw.hash_index((3,), 2.0), T, INTEGER),
    ("hash shape", lambda: jw.hash_index(3, 2), T, SHAPE),
    ("hash seed", lambda: jw.hash_index((3,), 2, seed="0"), T, INTEGER),
    ("no such name", lambda: jw.keras, AttributeError, "module 'jaxweights' has no attribute 'keras'"),
]
