"""The table of benchmark cases, with the reference and the goal of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import programs
from flax import nnx
from programs import BOTH, CLIP, KEY, MASK, Pair, Size
from timing import Effort, Spread, compare, temporary_bytes

import jaxweights as jw


@dataclasses.dataclass(frozen=True)
class TimeCase:
    """Two programs timed in alternation; `goal` is the largest acceptable ratio ours / theirs."""

    group: str
    name: str
    against: str
    setup: Callable[[Size], Pair]
    goal: float | None = None
    unit: str = "ms"

    def measure(self, size: Size, effort: Effort) -> dict[str, Any]:
        result = compare(*self.setup(size), effort)
        return {
            "ratio": dataclasses.asdict(result.ratio),
            "ours": result.ours.median * 1e3,
            "theirs": result.theirs.median * 1e3,
            "rounds": result.rounds,
        }


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """Temporary memory of one transform method on the whole tree, relative to the bytes of the weights."""

    name: str
    transform: jw.Transform
    verb: str
    goal: float | None = None
    group: str = "temporary memory"
    against: str = "the weights"
    unit: str = "MB"

    def measure(self, size: Size, effort: Effort) -> dict[str, Any]:
        del effort  # deterministic: a property of the compiled program
        lifted = jw.on_tree(self.transform)
        params = jax.eval_shape(lambda: programs.weights(size))
        state = jax.eval_shape(lifted.init, params, KEY)
        used = temporary_bytes(getattr(lifted, self.verb), params, state)
        total = sum(w.size * w.dtype.itemsize for w in params.values())
        ratio = dataclasses.asdict(Spread.of([used / total]))
        return {"ratio": ratio, "ours": used / 1e6, "theirs": total / 1e6, "rounds": 1}


RAMP = optax.polynomial_schedule(0.0, 0.8, 3, 1000)
TECHNIQUES = {  # with the goal for `apply`: 1.1 if it is element-wise, 1.6 if it reads the weight twice
    "ClipWeights": (jw.ClipWeights(0.1), 1.1),
    "Sparsify": (jw.Sparsify(0.05), 1.1),
    "Prune": (jw.Prune(0.5), 1.1),
    "ClipNorm": (jw.ClipNorm(1.0), 1.6),
    "WeightNorm": (jw.WeightNorm(), 1.6),
    "SpectralNorm": (jw.SpectralNorm(), None),
    "FakeQuantize": (jw.FakeQuantize(8), None),
    "ShareWeights": (jw.ShareWeights(jw.sharing.Hashed(16)), None),
}
LINEN = {
    "SpectralNorm": (
        lambda n: jw.linen.Transformed(nn.Dense(n), jw.SpectralNorm()),
        lambda n: nn.SpectralNorm(nn.Dense(n)),
        {"update_stats": True},
    ),
    "WeightNorm": (
        lambda n: jw.linen.Transformed(nn.Dense(n), jw.WeightNorm()),
        lambda n: nn.WeightNorm(nn.Dense(n)),
        {},
    ),
    "BatchNorm": (
        lambda n: nn.Sequential([nn.Dense(n), jw.linen.BatchNorm(use_running_average=False)]),
        lambda n: nn.Sequential([nn.Dense(n), nn.BatchNorm(use_running_average=False)]),
        {},
    ),
    "LayerNorm": (
        lambda n: nn.Sequential([nn.Dense(n), jw.linen.LayerNorm()]),
        lambda n: nn.Sequential([nn.Dense(n), nn.LayerNorm()]),
        {},
    ),
}
NNX = {
    "SpectralNorm": (
        lambda n, rngs: jw.nnx.transformed(nnx.Linear(n, n, rngs=rngs), jw.SpectralNorm(), rngs=rngs),
        lambda n, rngs: nnx.SpectralNorm(nnx.Linear(n, n, rngs=rngs), rngs=rngs),
    ),
    "WeightNorm": (
        lambda n, rngs: jw.nnx.transformed(nnx.Linear(n, n, rngs=rngs), jw.WeightNorm(), rngs=rngs),
        lambda n, rngs: nnx.WeightNorm(nnx.Linear(n, n, rngs=rngs), rngs=rngs),
    ),
    "BatchNorm": (
        lambda n, rngs: nnx.Sequential(nnx.Linear(n, n, rngs=rngs), jw.nnx.BatchNorm(n)),
        lambda n, rngs: nnx.Sequential(nnx.Linear(n, n, rngs=rngs), nnx.BatchNorm(n, rngs=rngs)),
    ),
    "LayerNorm": (
        lambda n, rngs: nnx.Sequential(nnx.Linear(n, n, rngs=rngs), jw.nnx.LayerNorm(n)),
        lambda n, rngs: nnx.Sequential(nnx.Linear(n, n, rngs=rngs), nnx.LayerNorm(n, rngs=rngs)),
    ),
}
COMPILED = {
    "ClipWeights": jw.ClipWeights(0.1),
    "WeightNorm": jw.WeightNorm(),
    "SpectralNorm": jw.SpectralNorm(),
    "Prune on a schedule": jw.Prune(RAMP),
}

CASES: list[TimeCase | MemoryCase] = [
    *(
        TimeCase("apply", name, "a scaled copy", partial(programs.against_copy, transform), goal)
        for name, (transform, goal) in TECHNIQUES.items()
    ),
    TimeCase("apply", "add_weight_decay", "optax.add_decayed_weights", programs.decay_against_optax, 1.1),
    TimeCase(
        "apply",
        "batch_norm",
        "nn.BatchNorm",
        partial(programs.norm_against_flax, jw.batch_norm, nn.BatchNorm(use_running_average=False)),
    ),
    TimeCase(
        "apply",
        "layer_norm",
        "nn.LayerNorm",
        partial(programs.norm_against_flax, jw.layer_norm, nn.LayerNorm()),
    ),
    TimeCase("Adam step", "project: clip", "Adam", partial(programs.projected_against_adam, CLIP)),
    TimeCase("Adam step", "project: mask", "Adam", partial(programs.projected_against_adam, MASK)),
    TimeCase("Adam step", "decay, project: clip, mask", "Adam", partial(programs.projected_against_adam, BOTH), 1.05),
    TimeCase(
        "Adam step",
        "decay, project: clip, mask, in bfloat16",
        "Adam in bfloat16",
        partial(programs.projected_against_adam, BOTH, dtype=jnp.bfloat16),
        1.2,
    ),
    TimeCase("Adam step", "decay, then apply: clip, mask", "Adam", programs.applied_against_adam, 1.05),
    TimeCase(
        "Adam step", "decay, project: clip, mask", "optax decay and box, mask by hand", programs.projected_against_optax
    ),
    *(
        TimeCase("Linen step", name, f"nn.{name}", partial(programs.linen_modules, ours, theirs, **options))
        for name, (ours, theirs, options) in LINEN.items()
    ),
    *(
        TimeCase("NNX step", name, f"nnx.{name}", partial(programs.nnx_modules, ours, theirs))
        for name, (ours, theirs) in NNX.items()
    ),
    *(
        TimeCase(
            "compilation, 100 leaves", name, "a loop over leaves", partial(programs.compile_against_loop, transform)
        )
        for name, transform in COMPILED.items()
    ),
    *(
        TimeCase(
            "compilation, growth",  # 10 if compile time is proportional to the number of leaves
            name,
            "a tenth of the leaves",
            partial(programs.compile_growth, transform),
        )
        for name, transform in COMPILED.items()
    ),
    *(MemoryCase(f"{name}, apply", transform, "apply") for name, (transform, _) in TECHNIQUES.items()),
    MemoryCase("SpectralNorm, update", jw.SpectralNorm(), "update"),
    MemoryCase("Prune on a schedule, update", jw.Prune(RAMP), "update"),
]
