"""The table of cases for the contract tests: every technique and variant.

To cover a new technique or variant, add one line here; the tests in `contract` then check it. A default run checks
every case in one program, and one case of each kind against the whole contract. The `slow` tests check every case
against the whole contract.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw

KEY = jax.random.key(7)
KINDS = (
    "stateless",
    "learned",
    "stateful",
    "scheduled",
    "joint",
    "Chain",
    "Around",
    "straight-through",
    "no transform",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One technique or variant.

    Attributes:
      name: used as test id.
      transform: makes a new spec at each call; None for techniques that are not transforms.
      function: w -> w' at the array level, for techniques that are not transforms.
      shape: shape of the weight.
      idempotent: a second application changes nothing. False for estimates that each step improves.
      kind: the member of `KINDS` this case represents in a default run. Set for one case per kind.
    """

    name: str
    transform: Callable[[], jw.Transform] | None = None
    function: Callable[[jax.Array], jax.Array] | None = None
    shape: tuple[int, ...] = (64, 32)
    idempotent: bool = True
    kind: str | None = None

    def call(self, w: jax.Array, key: jax.Array = KEY) -> jax.Array:
        """Applies the technique to a weight: init, update and apply for a transform."""
        if self.function is not None:
            return self.function(w)
        assert self.transform is not None
        t = self.transform()
        state = t.init(jax.lax.stop_gradient(w), key)
        state = t.update(jax.lax.stop_gradient(w), state)
        return t.apply(w, {n: a if n in t.learned else jax.lax.stop_gradient(a) for n, a in state.items()})


def halving(step):
    """Schedule: 1/2, 1/4, 1/8 ..."""
    return 0.5 ** (step.astype(jnp.float32) + 1.0)


def growing(step):
    """Sparsity schedule: 0, 0.3, 0.6, 0.9, 0.9 ..."""
    return jnp.minimum(0.3 * step.astype(jnp.float32), 0.9)


def fewer_bits(step):
    """Schedule of bits: 8, 6, 4, 2, 2 ..."""
    return jnp.maximum(8.0 - 2.0 * step.astype(jnp.float32), 2.0)


zero_points = jw.formats.integers(4, symmetric=False)
ATTENTION = (16, 4, 8)
CONV = (3, 3, 16, 32)
STACK = (3, 16, 32)
stack_axes = jw.Axes(input=-2, output=-1, batch=0)
depthwise = jw.axes.depthwise(32)


def per_feature(w, value):
    """Constant norm parameter over the last axis of `w`."""
    return jnp.full(w.shape[-1:], value, w.dtype)


def folded_after(w):
    """The kernel (*window, out, in) of a layer behind a batch norm, plus the bias."""
    stats = {"mean": per_feature(w, 1e-3), "var": per_feature(w, 2)}  # the bias sums up 288 entries: within float16
    kernel, bias = jw.fold_batch_norm(w, **stats, axes=jw.axes.CONV_TRANSPOSE_KERNEL, follows=True)
    return kernel + bias[None, None, :, None]


def fitted(method, w):
    """The weight by a one-shot method, for inputs that are correlated."""
    i = np.arange(w.shape[0])
    size = np.exp(-i / len(i)).astype(np.float32)
    moment = np.float32(0.5) ** np.abs(i[:, None] - i) * size * size[:, None]
    stats = jw.calibration.InputStats(jnp.int32(1), *map(jnp.float32, (size, size**2, moment)))
    return method.fit(w, stats).todense()


TRANSFORMS = [
    Case("weight_norm", lambda: jw.WeightNorm(), kind="learned"),
    Case("weight_norm attention", lambda: jw.WeightNorm(jw.axes.ATTENTION_IN), shape=ATTENTION),
    Case("weight_norm scale", lambda: jw.WeightNorm(scale=2.0)),
    Case("weight_norm vector", lambda: jw.WeightNorm(), shape=(64,)),
    Case("weight_norm centred", lambda: jw.Chain(jw.projections.Center(), jw.WeightNorm(jw.axes.WHOLE)), shape=CONV),
    Case("weight_standardization", lambda: jw.WeightStandardization(2.0, scaled=True), shape=CONV),
    Case("spectral_norm", lambda: jw.SpectralNorm(), idempotent=False, kind="stateful"),
    Case("spectral_norm soft", lambda: jw.SpectralNorm(n_steps=3, target=halving, soft=True), idempotent=False),
    Case(
        "spectral_norm attention", lambda: jw.SpectralNorm(1, jw.axes.ATTENTION_OUT), shape=(4, 8, 16), idempotent=False
    ),
    Case("spectral_norm conv", lambda: jw.SpectralNorm(), shape=CONV, idempotent=False),
    Case("spectral_norm stack", lambda: jw.SpectralNorm(1, stack_axes), shape=STACK, idempotent=False),
    Case("spectral_norm depthwise", lambda: jw.SpectralNorm(1, depthwise), shape=(3, 3, 1, 256), idempotent=False),
    Case("conv_spectral_norm", lambda: jw.ConvSpectralNorm((5, 6, 16), strides=2), shape=CONV, idempotent=False),
    Case(
        "conv_spectral_norm soft",
        lambda: jw.ConvSpectralNorm((5, 6, 16), strides=2, target=halving, soft=True),
        shape=CONV,
        idempotent=False,
    ),
    Case("clip_weights", lambda: jw.ClipWeights(0.5)),
    Case("clip_weights schedule", lambda: jw.ClipWeights(halving)),
    Case("clip_norm", lambda: jw.ClipNorm(1.0)),
    Case("clip_norm conv", lambda: jw.ClipNorm(1.0), shape=CONV, kind="stateless"),
    Case("clip_norm schedule", lambda: jw.ClipNorm(halving)),
    # Wide: XLA gathers the shorter sides of the blocks held by one row of the mesh, here a quarter of the weight.
    Case("orthogonalize", lambda: jw.projections.Orthogonalize(), shape=(16, 64)),
    Case("orthogonalize attention", lambda: jw.projections.Orthogonalize(axes=jw.axes.ATTENTION_IN), shape=ATTENTION),
    Case("clip_singular_values", lambda: jw.projections.ClipSingularValues(5.0), shape=(16, 64)),
    Case("clip_singular_values stack", lambda: jw.projections.ClipSingularValues(halving, stack_axes), shape=STACK),
    Case("clip_range", lambda: jw.projections.ClipRange(0.0)),
    Case("clip_range schedule", lambda: jw.projections.ClipRange(-0.2, halving)),
    Case("bound_norm", lambda: jw.projections.BoundNorm(1.0, 2.0)),
    Case("bound_norm conv", lambda: jw.projections.BoundNorm(1.0, 1.0), shape=CONV),
    Case("simplex", lambda: jw.projections.Simplex()),
    Case("simplex attention", lambda: jw.projections.Simplex(2.0, jw.axes.ATTENTION_IN), shape=ATTENTION),
    Case("l1_ball", lambda: jw.projections.L1Ball(5.0)),
    Case("l1_sphere", lambda: jw.projections.L1Sphere(5.0)),
    Case("bound_sum", lambda: jw.projections.BoundSum(-1.0, 1.0), shape=CONV),
    Case(
        "bound_sum normal",
        lambda: jw.projections.BoundSum(1.0, 1.0, normal=tuple((1.0 + i % 3,) for i in range(64))),
    ),
    Case("l1_ball stack", lambda: jw.projections.L1Ball(halving, stack_axes), shape=STACK),
    Case("around clip_weights", lambda: jw.Around(jw.ClipWeights(0.05))),
    Case("around clip_norm", lambda: jw.Around(jw.ClipNorm(halving)), shape=CONV, kind="Around"),
    Case("share_weights", lambda: jw.ShareWeights(8)),
    Case("share_weights sum", lambda: jw.ShareWeights(8, codebook_gradient="sum")),
    Case("share_weights mean zeros", lambda: jw.ShareWeights(8, keep_zeros=True, codebook_gradient="mean")),
    Case("share_weights stack", lambda: jw.ShareWeights(4, codebook_gradient="sum", axes=stack_axes), shape=STACK),
    Case("share_weights hashed", lambda: jw.ShareWeights(jw.sharing.Hashed(8))),
    Case("share_weights symmetric", lambda: jw.ShareWeights(jw.sharing.Symmetric()), shape=(32, 32)),
    Case(
        "share_weights circulant stack", lambda: jw.ShareWeights(jw.sharing.Circulant(), axes=stack_axes), shape=STACK
    ),
    Case(
        "share_weights toeplitz attention",
        lambda: jw.ShareWeights(jw.sharing.Toeplitz(), codebook_gradient="sum", axes=jw.axes.ATTENTION_IN),
        shape=ATTENTION,
    ),
    Case(
        "share_weights convolution",
        lambda: jw.ShareWeights(jw.sharing.Convolution((3, 3, 2, 4), (4, 8, 2), strides=2)),
    ),
    Case("share_weights p4m", lambda: jw.ShareWeights(jw.sharing.GroupConvolution("p4m")), shape=CONV),
    Case(
        "share_weights sub-vectors",
        lambda: jw.ShareWeights(jw.sharing.ProductQuantized(8, length=4), codebook_gradient="mean"),
        idempotent=False,
    ),
    Case("share_weights density", lambda: jw.ShareWeights(8, start="density", keep_zeros=True)),
    Case("fake_quantize", lambda: jw.FakeQuantize(4), kind="straight-through"),
    Case("fake_quantize per unit", lambda: jw.FakeQuantize(4, per_unit=True), shape=CONV),
    Case("fake_quantize zeros", lambda: jw.FakeQuantize(4, keep_zeros=True)),
    Case("fake_quantize int4", lambda: jw.FakeQuantize("int4"), shape=CONV),
    Case("fake_quantize zero points", lambda: jw.FakeQuantize(zero_points, axes=stack_axes), shape=STACK),
    Case("fake_quantize nf4", lambda: jw.FakeQuantize("nf4", axes=jw.axes.ATTENTION_IN), shape=ATTENTION),
    Case("fake_quantize mxfp8 late", lambda: jw.FakeQuantize("mxfp8", delay=1)),
    Case("fake_quantize moving", lambda: jw.FakeQuantize("fp8_e4m3", decay=0.9), shape=CONV),
    Case("fake_quantize moving min-max", lambda: jw.FakeQuantize(8, decay=0.9)),
    Case("fake_quantize schedule", lambda: jw.FakeQuantize(fewer_bits)),
    Case("fake_quantize schedule zeros", lambda: jw.FakeQuantize(fewer_bits, per_unit=True, keep_zeros=True)),
    Case("lsq", lambda: jw.LSQ(4)),
    Case("lsq mxfp4 stack", lambda: jw.LSQ("mxfp4", stack_axes, block=8), shape=STACK),
    Case("lsq offset conv", lambda: jw.LSQ(zero_points), shape=CONV),
    Case("pruned and quantized", lambda: jw.Chain(jw.Prune(0.7), jw.FakeQuantize(8, keep_zeros=True))),
    Case("sparsify", lambda: jw.Sparsify(0.5)),
    Case("sparsify schedule", lambda: jw.Sparsify(halving)),
    Case("prune", lambda: jw.Prune(0.7)),
    Case("prune schedule", lambda: jw.Prune(growing), shape=CONV, kind="scheduled"),
    Case("prune global", lambda: jw.Prune(growing, distribution=jw.pruning.Global()), shape=CONV, kind="joint"),
    Case("prune global capped", lambda: jw.Prune(growing, distribution=jw.pruning.Global(max_sparsity=0.95))),
    Case("prune padded blocks", lambda: jw.Prune(growing, structure=jw.pruning.Blocks(5, 3, pool="mean"))),
    Case("prune n:m stack", lambda: jw.Prune((2, 4), axes=stack_axes, straight_through=True), shape=STACK),
    Case("keep_zeros", lambda: jw.Chain(jw.Sparsify(0.5), jw.KeepZeros())),
    Case("regrow", lambda: jw.Regrow(jw.Prune(0.7), grow=jw.scores.random, fraction=halving, every=1)),
    Case(
        "chain",
        lambda: jw.Chain(jw.SpectralNorm(), jw.WeightNorm(), jw.ClipWeights(halving)),
        idempotent=False,
        kind="Chain",
    ),
]

FUNCTIONS = [
    Case("weight_decay", function=lambda w: jw.weight_decay(w / 2, w, 0.1)),
    Case(
        "weight_decay cautious L1",
        function=lambda w: jw.weight_decay(w / 2, w, 0.1, penalty_grad=jnp.sign, toward=w[::-1], cautious=True),
    ),
    Case("batch_norm", function=lambda x: jw.batch_norm(x, per_feature(x, 2), per_feature(x, 1)), kind="no transform"),
    Case("batch_norm masked", function=lambda x: jw.batch_norm(x, where=jnp.arange(x.shape[0])[:, None] < 40)),
    Case("batch_norm features", function=lambda x: jw.batch_norm(x, per_feature(x.T, 0.5), feature_axes=0)),
    Case("batch_norm ghosts", function=lambda x: jw.batch_norm(x, ghost_size=16)),
    Case(
        "batch_renorm",
        function=lambda x: jw.batch_renorm(x, mean=per_feature(x, 1), var=per_feature(x, 2), r_max=1.2, d_max=0.5),
    ),
    Case(
        "fold_batch_norm",
        function=lambda w: jw.fold_batch_norm(w, mean=per_feature(w, 1), var=per_feature(w, 2))[0],
        shape=CONV,
    ),
    Case(
        "fold_batch_norm follows",
        function=folded_after,
        shape=CONV,
    ),
    Case("layer_norm", function=lambda x: jw.layer_norm(x, per_feature(x, 2), per_feature(x, 1))),
    Case("layer_norm features", function=lambda x: jw.layer_norm(x, per_feature(x, 2), axis=0, feature_axes=1)),
    Case("rms_norm", function=lambda x: jw.rms_norm(x, per_feature(x, 2))),
    Case("group_norm", function=lambda x: jw.group_norm(x, n_groups=4), shape=(4, 6, 32)),
    Case(
        "instance_norm masked",
        function=lambda x: jw.instance_norm(x, where=jnp.arange(x.shape[1])[:, None] < 20),
        shape=(4, 24, 32),
    ),
    Case("spectral_normalize exact", function=jw.spectral_normalize),
    Case("weight_normalize", function=jw.weight_normalize),
    Case("clip_range arrays", function=lambda w: jw.projections.clip_range(w, -0.5, jnp.arange(64.0)[:, None] / 64)),
    Case("he_normal", function=lambda w: w + jw.he_normal(KEY, w.shape, w.dtype)),
    Case("xavier_uniform", function=lambda w: w + jw.xavier_uniform(KEY, w.shape, w.dtype)),
    Case(
        "truncated_normal tail",
        function=lambda w: w + jw.initializers.truncated_normal(KEY, w.shape, w.dtype, low=5.0, high=6.0),
    ),
    Case(
        "orthogonal attention",
        function=lambda w: w + jw.initializers.orthogonal(KEY, w.shape, w.dtype, axes=jw.axes.ATTENTION_IN),
        shape=ATTENTION,
    ),
    Case(
        "with_stored",
        function=lambda w: jw.with_stored(lambda q, x: x @ q)(jw.quantize(w, 8), jnp.eye(w.shape[0], dtype=w.dtype)),
    ),
    Case("round_to_nearest", function=lambda w: fitted(jw.methods.RoundToNearest("nf4"), w)),
    # Wide: every device needs the whole second moment.
    Case("gptq", function=lambda w: fitted(jw.methods.GPTQ(4, block=8), w), shape=(16, 64)),
    Case(
        "gptq act_order",
        function=lambda w: fitted(jw.methods.GPTQ("nvfp4", block=8, act_order=True), w),
        shape=(16, 64),
    ),
    Case("awq", function=lambda w: fitted(jw.methods.AWQ(4, block=16), w)),
    Case("hqq", function=lambda w: fitted(jw.methods.HQQ(4), w)),
    Case("cluster", function=lambda w: fitted(jw.methods.Cluster(16, keep_zeros=True), w)),
    Case("cluster per unit", function=lambda w: fitted(jw.methods.Cluster(4, per_unit=True, weighted=True), w)),
    Case("densify", function=lambda w: jw.densify({"w": jw.quantize(w, 8)})["w"]),
    *(
        Case(f"quantize {name}", function=lambda w, format=format: jw.dequantize(jw.quantize(w, format, key=KEY)))
        for name, format in [
            *((name, name) for name in ("int3", "fp4", "fp8_e5m2", "mxfp4", "nvfp4", "ternary", "binary")),
            ("zero points", zero_points),
            ("nf4 doubly", jw.formats.NF4_DOUBLE),
            ("per tensor", jw.formats.integers(8, per_tensor=True)),
        ]
    ),
    Case("sparse", function=lambda w: w + jw.initializers.sparse(KEY, w.shape, w.dtype, sparsity=0.5)),
]

CASES = TRANSFORMS + FUNCTIONS
