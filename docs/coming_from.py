"""Code of other libraries, and what it is here. tests/docs/test_coming_from.py runs every line."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Line:
    """Two pieces of code that do the same, for a kernel `w` (in, out), inputs `x` and gradients `grads`.

    Attributes:
      theirs: code of the other library. `m` is a layer with the weight wᵀ in torch.
      ours: the code here.
      same: what is compared: "values", "std" of what is drawn, "singular values", or the "number of zeros".
      formula: what `ours` must give, in NumPy and the functions of the test, where the other library is not run.
      note: what else there is to know.
    """

    theirs: str
    ours: str
    same: str = "values"
    formula: str = ""
    note: str = ""


FLAX = [
    Line(
        "nn.WeightNorm(nn.Dense(4))",
        "jw.linen.Transformed(nn.Dense(4), jw.WeightNorm(scale=1.0))",
        note="`jw.WeightNorm()` keeps the function instead",
    ),
    Line("nn.BatchNorm(use_running_average=False)", "jw.linen.BatchNorm(use_running_average=False)"),
    Line("nn.LayerNorm()", "jw.linen.LayerNorm()"),
    Line("nn.RMSNorm()", "jw.linen.RMSNorm()"),
    Line("nn.GroupNorm(num_groups=2)", "jw.linen.GroupNorm(num_groups=2)"),
    Line("nnx.BatchNorm(6, rngs=rngs)", "jw.nnx.BatchNorm(6, rngs=rngs)"),
    Line("nnx.LayerNorm(6, rngs=rngs)", "jw.nnx.LayerNorm(6, rngs=rngs)"),
    Line("nnx.RMSNorm(6, rngs=rngs)", "jw.nnx.RMSNorm(6, rngs=rngs)"),
    Line(
        "nn.SpectralNorm(nn.Dense(4))",
        "jw.linen.Transformed(nn.Dense(4), jw.SpectralNorm())",
        "singular values",
        note='steps with `update_stats=True` there, `mutable=["weight_transform"]` here',
    ),
    Line("nn.initializers.he_normal()", "functools.partial(jw.he_normal, truncated=True)", "std"),
    Line("nn.initializers.lecun_normal()", "functools.partial(jw.initializers.lecun_normal, truncated=True)", "std"),
    Line("nn.initializers.glorot_uniform()", "jw.xavier_uniform", "std"),
    Line("nn.initializers.orthogonal()", "jw.initializers.orthogonal", "singular values"),
]

OPTAX = [
    Line(
        "optax.add_decayed_weights(0.1)",
        'jw.add_weight_decay(0.1, where="**")',
        note="without `where`, biases and scales are left out",
    ),
    Line(
        "optax.adamw(1e-3, weight_decay=0.1)",
        'optax.chain(optax.scale_by_adam(), jw.add_weight_decay(0.1, where="**"), optax.scale_by_learning_rate(1e-3))',
    ),
    Line(
        "optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())",
        'optax.chain(optax.sgd(0.1), jw.project(jw.projections.ClipRange(0.0), where="**"))',
    ),
    Line("optax.projections.projection_non_negative(w)", "jw.projections.clip_range(w, 0.0)"),
    Line("optax.projections.projection_box(w, -0.5, 0.5)", "jw.clip_weights(w, 0.5)"),
    Line(
        "optax.projections.projection_simplex(w)",
        "jw.projections.project_simplex(w, axes=jw.axes.WHOLE)",
        note="without `axes`, each output unit by itself",
    ),
    Line("optax.projections.projection_l1_ball(w, 1.0)", "jw.projections.project_l1_ball(w, 1.0, axes=jw.axes.WHOLE)"),
    Line(
        "optax.projections.projection_l1_sphere(w, 1.0)", "jw.projections.project_l1_sphere(w, 1.0, axes=jw.axes.WHOLE)"
    ),
    Line("optax.projections.projection_l2_ball(w, 1.0)", "jw.clip_norm(w, 1.0, axes=jw.axes.WHOLE)"),
    Line(
        "optax.projections.projection_l2_sphere(w, 1.0)", "jw.projections.bound_norm(w, 1.0, 1.0, axes=jw.axes.WHOLE)"
    ),
]

TORCH = [
    Line("parametrizations.weight_norm(m)", "jw.WeightNorm()"),
    Line("parametrizations.spectral_norm(m, n_power_iterations=50)", "jw.SpectralNorm()"),
    Line(
        "parametrizations.orthogonal(m)",
        "jw.projections.Orthogonalize()",
        "singular values",
        note="torch starts from another matrix",
    ),
    Line('prune.l1_unstructured(m, "weight", amount=0.5)', "jw.Prune(0.5)"),
    Line(
        'prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0)', "jw.Prune(0.5, structure=jw.pruning.OutputUnits())"
    ),
    Line(
        'prune.ln_structured(m, "weight", amount=0.5, n=2, dim=1)', "jw.Prune(0.5, structure=jw.pruning.InputUnits())"
    ),
    Line(
        'prune.random_unstructured(m, "weight", amount=0.5)', "jw.Prune(0.5, score=jw.scores.random)", "number of zeros"
    ),
    Line(
        'prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.5)',
        "jw.Prune(0.5, distribution=jw.pruning.Global())",
    ),
    Line("m.weight.data.clamp_(-0.5, 0.5)", "jw.clip_weights(w, 0.5)"),
    Line("torch.renorm(m.weight, 2, 0, 1.0)", "jw.clip_norm(w, 1.0)"),
    Line("F.layer_norm(x, (6,))", "jw.layer_norm(x, eps=1e-5)", note="ε is 1e-6 here, as in Flax"),
    Line("F.rms_norm(x, (6,), eps=1e-6)", "jw.rms_norm(x)"),
    Line("F.group_norm(x, 2)", "jw.group_norm(x, n_groups=2, eps=1e-5)"),
    Line("F.batch_norm(x, None, None, training=True)", "jw.batch_norm(x)"),
]

TORCH_INIT = [
    Line("xavier_uniform_(m.weight)", "jw.xavier_uniform", "std"),
    Line("xavier_normal_(m.weight)", "jw.xavier_normal", "std"),
    Line('kaiming_uniform_(m.weight, nonlinearity="relu")', "jw.he_uniform", "std"),
    Line('kaiming_normal_(m.weight, nonlinearity="relu")', "jw.he_normal", "std"),
    Line(
        'kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")',
        'functools.partial(jw.he_normal, mode="fan_out")',
        "std",
    ),
    Line(
        "trunc_normal_(m.weight, std=0.02, a=-0.04, b=0.04)",
        "functools.partial(jw.initializers.truncated_normal, std=0.02)",
        "std",
        note="limits are absolute in torch, in standard deviations here",
    ),
    Line(
        "orthogonal_(m.weight, gain=2.0)", "functools.partial(jw.initializers.orthogonal, gain=2.0)", "singular values"
    ),
    Line("eye_(m.weight)", "jw.initializers.identity"),
    Line("constant_(m.weight, 0.5)", "functools.partial(jw.initializers.constant, value=0.5)"),
    Line("zeros_(m.weight)", "jw.initializers.zeros"),
    Line("ones_(m.weight)", "jw.initializers.ones"),
]

KERAS = [
    Line("MaxNorm(1.0)", "jw.ClipNorm(1.0)", formula="w * np.minimum(1, 1 / np.linalg.norm(w, axis=0))"),
    Line("NonNeg()", "jw.projections.ClipRange(0.0)", formula="np.maximum(w, 0)"),
    Line("UnitNorm()", "jw.projections.BoundNorm(1.0, 1.0)", formula="w / np.linalg.norm(w, axis=0)"),
    Line(
        "MinMaxNorm(0.5, 1.0, rate=0.5)",
        "jw.projections.BoundNorm(0.5, 1.0, rate=0.5)",
        formula="w * (0.5 * np.clip(np.linalg.norm(w, axis=0), 0.5, 1) / np.linalg.norm(w, axis=0) + 0.5)",
    ),
]

TFMOT = [
    Line(
        "PolynomialDecay(0.0, 0.8, 100, 200, frequency=1)",
        "jw.pruning.PolynomialSparsity(0.8, 100, 200)(150)",
        formula="0.8 * (1 - 0.5**3)",
        note="the schedule of `jw.Prune`; the value at step 150",
    ),
    Line("ConstantSparsity(0.5, begin_step=0)", "jw.Prune(0.5)", formula="larger_half(w)"),
    Line(
        "sparsity_m_by_n=(2, 4)",
        "jw.Prune((2, 4))",
        "number of zeros",
        formula="np.arange(32) % 2",
        note="for a kernel of 8 inputs",
    ),
    Line("cluster_weights(m, number_of_clusters=4)", "jw.ShareWeights(4)", "number of values", formula="np.arange(4)"),
]

JAXPRUNER = [
    Line("MagnitudePruning(sparsity=0.5)", "jw.Prune(0.5)", formula="larger_half(w)"),
    Line(
        "GlobalMagnitudePruning(sparsity=0.5)",
        "jw.Prune(0.5, distribution=jw.pruning.Global())",
        formula="larger_half(w)",
    ),
    Line(
        "RandomPruning(sparsity=0.5)",
        "jw.Prune(0.5, score=jw.scores.random)",
        "number of zeros",
        formula="larger_half(w)",
    ),
    Line(
        "RigL(sparsity=0.5)",
        "jw.Regrow(jw.Prune(0.5, score=jw.scores.random))",
        "number of zeros",
        formula="larger_half(w)",
        note="in `jw.confine(optimizer, ...)`, any optimizer",
    ),
    Line(
        "SET(sparsity=0.5)",
        "jw.Regrow(jw.Prune(0.5, score=jw.scores.random), grow=jw.scores.random)",
        "number of zeros",
        formula="larger_half(w)",
    ),
    Line("SteMagnitudePruning(sparsity=0.5)", "jw.Prune(0.5, straight_through=True)", formula="larger_half(w)"),
]

QUANTIZATION = [
    Line("torchao: Int8WeightOnlyConfig()", "jw.quantize(w, 8)", formula="nearest(w, 127)"),
    Line(
        "torchao: Int4WeightOnlyConfig(group_size=32)",
        "jw.quantize(w, 4, block=32)",
        formula="nearest(w, 7)",
        note="int4 of torchao has zero points: `jw.formats.integers(4, block=32, symmetric=False)`",
    ),
    Line(
        'Qwix: QuantizationRule(weight_qtype="int8")',
        "jw.quantize(w, 8)",
        formula="nearest(w, 127)",
        note="the scale of Qwix is absmax/127.5",
    ),
    Line(
        'bitsandbytes: Linear4bit(quant_type="nf4")',
        'jw.quantize(w, "nf4")',
        formula="nearest_nf4(w)",
        note="its blocks are of the flat weight, ours of an output unit",
    ),
    Line("bitsandbytes: Int8Params", "jw.quantize(w, 8)", formula="nearest(w, 127)"),
]

LIBRARIES = {
    "flax": FLAX,
    "optax": OPTAX,
    "torch": TORCH,
    "torch_init": TORCH_INIT,
    "keras": KERAS,
    "tfmot": TFMOT,
    "jaxpruner": JAXPRUNER,
    "quantization": QUANTIZATION,
}


def table(library: str) -> str:
    """The lines of a library as Markdown."""
    lines = LIBRARIES[library]
    notes = any(line.note for line in lines)
    rows = [["there", "here"] + ["note"] * notes, ["---"] * (2 + notes)]
    rows += [[f"`{line.theirs}`", f"`{line.ours}`"] + [line.note] * notes for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
