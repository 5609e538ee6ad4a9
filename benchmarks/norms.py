"""Norms against Flax and torch: python benchmarks/norms.py [--quick] [--only GLOB].

Accuracy: largest error against float64 on the same float32 input, with variance 1 and means from 0 to 10,000. Time:
forward, and forward plus backward, interleaved with each peer. Memory: bytes saved for the backward pass. Flax is
measured with its default fast variance, E[x²] − E[x]², and with its two-pass variance. torch gets its native
channels-first layout.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Effort, Program, compare, function

import jaxweights as jw

try:
    import torch
except ImportError:
    raise SystemExit("PyTorch is one of the peers that are measured: pip install torch") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEANS = (0, 10, 100, 1_000, 10_000)
GROUPS = 8
COLORS = {"jaxweights": "#1f5fa8", "Flax": "#d1495b", "Flax, two passes": "#e0a458", "torch": "#7a8ca3"}
OTHERS = list(COLORS)[1:]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm in all libraries.

    Attributes:
      ours: (x, scale, bias) -> y, features last.
      flax: makes Flax's module, given `use_fast_variance`.
      torch: (x, scale, bias) -> y, features last for layer and RMS norm, otherwise second.
      axis: axes of the statistics, after splitting the features into (groups, size).
      groups: number of feature groups; None if the features are not split.
      centered: whether the mean is subtracted.
      first: whether torch expects the features second, before the positions.
    """

    ours: Callable
    flax: Callable[..., nn.Module]
    torch: Callable
    axis: tuple[int, ...]
    groups: int | None = None
    centered: bool = True
    first: bool = False
    eps: float = 1e-6

    def exact(self, x: np.ndarray) -> np.ndarray:
        """The normalized input in float64."""
        z = np.float64(x)
        z = z if self.groups is None else z.reshape(*x.shape[:-1], self.groups, -1)
        z = z - z.mean(self.axis, keepdims=True) if self.centered else z
        return (z / np.sqrt((z * z).mean(self.axis, keepdims=True) + self.eps)).reshape(x.shape)

    def functions(self) -> dict[str, Callable]:
        """Returns our and Flax's functions of (x, scale, bias)."""
        return {
            "jaxweights": partial(self.ours, eps=self.eps),
            "Flax": partial(apply_flax, self.flax(use_fast_variance=True, epsilon=self.eps)),
            "Flax, two passes": partial(apply_flax, self.flax(use_fast_variance=False, epsilon=self.eps)),
        }


def apply_flax(module: nn.Module, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    params = {"scale": scale} if isinstance(module, nn.RMSNorm) else {"scale": scale, "bias": bias}
    running = {"batch_stats": {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}}
    return module.apply({"params": params, **running}, x, mutable=["batch_stats"])[0]


F = torch.nn.functional
LAYER = Norm(jw.layer_norm, nn.LayerNorm, lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6), (-1,))
RMS = Norm(
    lambda x, scale, bias, eps: jw.rms_norm(x, scale, eps=eps),
    nn.RMSNorm,
    lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-6),
    (-1,),
    centered=False,
)
GROUP = Norm(
    partial(jw.group_norm, n_groups=GROUPS),
    partial(nn.GroupNorm, GROUPS),
    lambda x, w, b: F.group_norm(x, GROUPS, w, b, 1e-6),
    (1, 2, -1),
    GROUPS,
    first=True,
)
BATCH = Norm(
    jw.batch_norm,
    partial(nn.BatchNorm, use_running_average=False),
    lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=1e-6),
    (0, 1, 2),
    first=True,
)
ROWS, IMAGES = (16384, 1024), (32, 56, 56, 64)
CASES = {
    "layer norm, 16384 × 1024": (LAYER, ROWS),
    "layer norm, 256 × 512": (LAYER, (256, 512)),
    "RMS norm, 16384 × 1024": (RMS, ROWS),
    "group norm, 32 × 56 × 56 × 64": (GROUP, IMAGES),
    "batch norm, 32 × 56 × 56 × 64": (BATCH, IMAGES),
}
ACCURACY = {
    "layer norm, 256 × 512": (LAYER, (256, 512)),
    "RMS norm, 256 × 512": (RMS, (256, 512)),
    "group norm, 8 × 28 × 28 × 64": (GROUP, (8, 28, 28, 64)),
    "batch norm, 8 × 28 × 28 × 64": (BATCH, (8, 28, 28, 64)),
}


def draw_data(shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) + mean).astype(np.float32)


def to_torch(norm: Norm, x: np.ndarray) -> torch.Tensor:
    """Converts to a contiguous tensor in torch's layout."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1) if norm.first else x))


def errors(norm: Norm, shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Largest error at each mean, per library."""
    out: dict[str, list[float]] = {name: [] for name in COLORS}
    scale, bias = np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)
    compiled = {name: jax.jit(f) for name, f in norm.functions().items()}
    for mean in MEANS:
        x = draw_data(shape, mean)
        exact = norm.exact(x)
        for name, f in compiled.items():
            out[name].append(float(np.abs(np.float64(f(x, scale, bias)) - exact).max()))
        y = norm.torch(to_torch(norm, x), torch.ones(shape[-1]), torch.zeros(shape[-1])).numpy()
        y = np.float64(np.moveaxis(y, 1, -1) if norm.first else y)
        out["torch"].append(float(np.abs(y - exact).max()))
    return out


def both_ways(f: Callable) -> Callable:
    """Returns a function that computes the value and the gradients."""

    def run(cotangent, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(cotangent)

    return run


def torch_programs(norm: Norm, x: np.ndarray) -> tuple[Program, Program, int]:
    """Returns forward, forward with backward, and the bytes saved between them."""
    tensor, cotangent = to_torch(norm, x), to_torch(norm, x[::-1])
    params = torch.ones(x.shape[-1], requires_grad=True), torch.zeros(x.shape[-1], requires_grad=True)

    def forward(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                norm.torch(tensor, *params)

    def both(n: int) -> None:
        for _ in range(n):
            leaf = tensor.detach().requires_grad_()
            torch.autograd.grad(norm.torch(leaf, *params), (leaf, *params), cotangent, allow_unused=True)

    stored: dict[int, int] = {}
    keep = lambda t: stored.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        norm.torch(tensor.detach().requires_grad_(), *params)
    return forward, both, sum(stored.values())


def stored_bytes(f: Callable, *args: Any) -> int:
    """Bytes of the residuals of a VJP, counting each buffer once."""
    kept = jax.tree.leaves(jax.vjp(f, *args)[1])
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in kept}.values())


def measure(norm: Norm, shape: tuple[int, ...], effort: Effort) -> dict[str, Any]:
    data = draw_data(shape, 1.0)
    x, cotangent = jnp.asarray(data), jnp.asarray(data[::-1])
    args = x, jnp.ones(shape[-1]), jnp.zeros(shape[-1])
    forward = {name: function(f, *args) for name, f in norm.functions().items()}
    both = {name: function(both_ways(f), cotangent, *args) for name, f in norm.functions().items()}
    stored = {name: stored_bytes(f, *args) / x.nbytes for name, f in norm.functions().items()}
    forward["torch"], both["torch"], n_bytes = torch_programs(norm, data)
    stored["torch"] = n_bytes / x.nbytes
    times = {}
    for kind, programs in (("forward", forward), ("forward and backward", both)):
        for other in OTHERS:
            result = compare(programs["jaxweights"], programs[other], effort)
            times[f"{kind}, {other}"] = {
                "ratio": dataclasses.asdict(result.ratio),
                "ours_ms": result.ours.median * 1e3,
                "theirs_ms": result.theirs.median * 1e3,
                "rounds": result.rounds,
            }
    return {"times": times, "stored": stored}


def main(arguments: list[str] | None = None) -> None:
    accepted = parser(__doc__)
    accepted.add_argument("--only", default="*", metavar="GLOB", help='what is timed, such as "layer*"')
    options = accepted.parse_args(arguments)
    effort = Effort(2, 0.1) if options.quick else Effort(40, 8)
    console = terminal(120)

    small = lambda shape: tuple(min(s, 16) for s in shape) if options.quick else shape
    report: dict[str, Any] = {
        "environment": environment("torch"),
        "quick": options.quick,
        "means": MEANS,
        "errors": {name: errors(norm, small(shape)) for name, (norm, shape) in ACCURACY.items()},
        "results": {},
    }
    for name, (norm, shape) in CASES.items():
        if fnmatch.fnmatchcase(name, options.only):
            with console.status(name):
                report["results"][name] = measure(norm, small(shape), effort)
    console.print(error_table(report), time_table(report["results"]))
    write(report, options.out, "norms", draw)


def error_table(report: dict[str, Any]) -> Table:
    out = Table(title="largest error against float64, by the mean of the input", title_justify="left")
    for name in ("norm", "library", *(f"{m:,}" for m in report["means"])):
        out.add_column(name, justify="left" if name in ("norm", "library") else "right", no_wrap=True)
    for norm, by_library in report["errors"].items():
        for library, values in by_library.items():
            out.add_row(norm if library == "jaxweights" else "", library, *(f"{v:.1e}" for v in values))
        out.add_section()
    return out


def time_table(results: dict[str, Any]) -> Table:
    out = Table(title="ratio ours / other: median \\[quartiles], and what a gradient stores / x", title_justify="left")
    for name in ("norm", "against"):
        out.add_column(name, no_wrap=True)
    for name in ("forward", "forward and backward", "stored: ours", "other"):
        out.add_column(name, justify="right", no_wrap=True)
    for norm, r in results.items():
        for other in OTHERS:
            cells = []
            for kind in ("forward", "forward and backward"):
                q = r["times"][f"{kind}, {other}"]["ratio"]
                cells.append(f"{q['median']:.2f} \\[{q['low']:.2f}, {q['high']:.2f}]")
            stored = f"{r['stored']['jaxweights']:.3f}", f"{r['stored'][other]:.3f}"
            out.add_row(norm if other == OTHERS[0] else "", other, *cells, *stored)
        out.add_section()
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws errors against the mean above, one panel per norm; times and stored bytes below."""
    figure = plt.figure(figsize=(11, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    panels = above.subplots(1, len(report["errors"]), sharey=True)
    for panel, (norm, by_library) in zip(panels, report["errors"].items(), strict=True):
        for library, values in by_library.items():
            ours = library == "jaxweights"
            style = {"lw": 3 if ours else 1.6, "ls": "--" if library == "Flax, two passes" else "-"}
            panel.plot(report["means"], values, "o", markersize=4, color=COLORS[library], label=library, **style)
        panel.set_xscale("symlog", linthresh=10)
        panel.set(yscale="log", xlabel="mean of the input", title=norm)
        panel.title.set_fontsize(9)
        tidy(panel)
    panels[0].set_ylabel("largest error, float32")
    panels[0].legend(frameon=False, fontsize=8)

    rows = list(report["results"])
    sides = below.subplots(1, 3, sharey=True)
    for panel, kind in zip(sides, ("forward", "forward and backward"), strict=False):
        for i, other in enumerate(OTHERS):
            q = [report["results"][r]["times"][f"{kind}, {other}"]["ratio"] for r in rows]
            bars(panel, i, len(OTHERS), [v["median"] for v in q], other)
        panel.axvline(1, color="black", lw=0.8, ls=":")
        panel.set_title(f"time, {kind}: jaxweights / other", fontsize=9)
    for i, library in enumerate(COLORS):
        values = [report["results"][r]["stored"][library] for r in rows]
        bars(sides[2], i, len(COLORS), values, library)
    sides[2].set_title("bytes a gradient stores / bytes of x", fontsize=9)
    sides[0].set_yticks(range(len(rows)), [r.replace(", ", "\n") for r in rows], fontsize=8)
    sides[0].invert_yaxis()
    handles, labels = sides[2].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=8)
    for panel in sides:
        panel.set_xlim(0, panel.get_xlim()[1] * 1.18)
        tidy(panel)
    e = report["environment"]
    figure.suptitle(f"{e['device']}, jax {e['jax']}, flax {e['flax']}, torch {e['torch']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(panel: plt.Axes, i: int, n: int, values: list[float], library: str) -> None:
    """Draws the i-th of n bars at each position."""
    height = 0.8 / n
    places = [place - 0.4 + (i + 0.5) * height for place in range(len(values))]
    drawn = panel.barh(places, values, height=height * 0.92, color=COLORS[library], label=library)
    panel.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)


def tidy(panel: plt.Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)


if __name__ == "__main__":
    main()
