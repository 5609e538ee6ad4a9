"""Spectral normalization against Flax and torch: python benchmarks/spectral_norm.py [--quick].

Error: relative error of σ after n one-step updates from random vectors, on Gaussian matrices. Time: one update,
interleaved with each peer. Tracking: σ of the kernel that a layer uses over 50 steps of AdamW at learning rate 0.01.
Stack: the 48 kernels of a 12-layer transformer, `linen.Transformed` against a Flax wrapper around each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Effort, Program, compare, compilation, function

import jaxweights as jw
from jaxweights.techniques.spectral import iteration

try:
    import torch
    from torch.nn.utils import parametrizations
except ImportError:
    raise SystemExit("PyTorch is one of the peers that are measured: pip install torch") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

COLORS = {"jaxweights": "#1f5fa8", "Flax": "#d1495b", "torch": "#7a8ca3"}
SHAPE = (512, 256)
N_UPDATES = 20


def gaussian(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def errors(seeds: int) -> dict[str, list[float]]:
    """Mean of |σ̂/σ − 1| over the matrices after each update, per library."""
    ws = [gaussian(seed) for seed in range(seeds)]
    exact = [np.linalg.norm(np.float64(w), 2) for w in ws]
    out = {name: np.zeros((seeds, N_UPDATES)) for name in COLORS}
    for i, (w, sigma) in enumerate(zip(ws, exact, strict=True)):
        for name, estimates in (("jaxweights", ours(w, i)), ("Flax", flax(w, i)), ("torch", torchs(w, i))):
            out[name][i] = np.abs(np.array(estimates) / sigma - 1)
    return {name: e.mean(0).tolist() for name, e in out.items()}


def operator(w: jax.Array) -> iteration.Operator:
    return iteration.Operator(lambda xs: xs @ w.T, w.shape[1:])


@jax.jit
def one_step(w: jax.Array, search: iteration.Search) -> tuple[iteration.Search, jax.Array]:
    search = iteration.step(operator(w), search)[0]
    return search, iteration.sigma(operator(w), search["v"])


def ours(w: np.ndarray, seed: int) -> list[float]:
    """Takes exactly one step per update and none at initialization."""
    search, found = iteration.start(operator(jnp.asarray(w)), jax.random.key(seed)), []
    for _ in range(N_UPDATES):
        search, sigma = one_step(w, search)
        found.append(float(sigma))
    return found


def wrapped(w: np.ndarray, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.SpectralNorm(nn.Dense(w.shape[1], use_bias=False))
    variables = layer.init(jax.random.key(seed), jnp.ones((1, w.shape[0])), update_stats=False)
    variables["params"]["layer_instance"]["kernel"] = jnp.asarray(w)
    return layer, variables


def sigma_of(variables: dict[str, Any]) -> jax.Array:
    """Returns Flax's estimate."""
    (sigma,) = (value for name, value in variables["batch_stats"].items() if name.endswith("sigma"))
    return sigma


def flax(w: np.ndarray, seed: int) -> list[float]:
    layer, variables = wrapped(w, seed)
    x, found = jnp.ones((1, w.shape[0])), []
    step = jax.jit(lambda v: layer.apply(v, x, update_stats=True, mutable=["batch_stats"])[1])
    for _ in range(N_UPDATES):
        variables = variables | step(variables)
        found.append(float(sigma_of(variables)))
    return found


def torchs(w: np.ndarray, seed: int) -> list[float]:
    """Starts u and v from random vectors like the others; torch would take 15 steps at initialization."""
    layer = torch_layer(w)
    (norm,) = layer.parametrizations.weight
    generator, found = torch.Generator().manual_seed(seed), []
    for vector in (norm._u, norm._v):
        vector.copy_(torch.nn.functional.normalize(torch.randn(vector.shape, generator=generator), dim=0))
    with torch.no_grad():
        for _ in range(N_UPDATES):
            used = layer.weight
            found.append(float(layer.parametrizations.weight.original.norm() / used.norm()))
    return found


def torch_layer(w: np.ndarray) -> torch.nn.Module:
    layer = torch.nn.Linear(*w.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w.T.copy()))
    return parametrizations.spectral_norm(layer)


def programs() -> dict[str, Program]:
    """One update, and the product of a row with the normalized weight."""
    w, x = gaussian(0), jnp.ones((1, SHAPE[0]))
    t = jw.SpectralNorm()

    def update(w, state):
        state = t.update(w, state)
        return state, x @ t.apply(w, state)

    state = jax.jit(t.init)(jnp.asarray(w), jax.random.key(0))
    for _ in range(N_UPDATES):
        state = jax.jit(t.update)(jnp.asarray(w), state)
    layer, variables = wrapped(w, 0)
    step = lambda v: layer.apply(v, x, update_stats=True, mutable=["batch_stats"])
    module, row = torch_layer(w), torch.ones(1, SHAPE[0])

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                module(row)

    return {"jaxweights": function(update, jnp.asarray(w), state), "Flax": function(step, variables), "torch": run}


def tracking(steps: int) -> dict[str, list[float]]:
    """σ of the kernel used at each step of AdamW, ours and Flax's, in a regression on random inputs."""
    w, teacher = (jnp.asarray(gaussian(seed) / 16) for seed in (0, 1))
    t, (layer, variables) = jw.SpectralNorm(), wrapped(np.asarray(w), 0)
    stats = {"batch_stats": variables["batch_stats"]}

    def move_ours(w, state):
        state = t.update(w, state)
        return state, lambda w: t.apply(w, state)

    def move_flax(w, state):
        params = {"params": {"layer_instance": {"kernel": w}}}
        x = jnp.ones((1, SHAPE[0]))
        state = layer.apply({**params, **state}, x, update_stats=True, mutable=["batch_stats"])[1]
        return state, lambda w: w / sigma_of(state)

    starts = {"jaxweights": (move_ours, jax.jit(t.init)(w, jax.random.key(0))), "Flax": (move_flax, stats)}
    return {name: train(w, teacher, move, state, steps) for name, (move, state) in starts.items()}


def train(w: jax.Array, teacher: jax.Array, move: Callable, state: Any, steps: int) -> list[float]:
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(w, state, opt, key):
        state, normalized = move(w, state)
        x = jax.random.normal(key, (128, SHAPE[0]))
        loss = lambda w: jnp.mean((jax.nn.relu(x @ normalized(w)) - jax.nn.relu(x @ teacher)) ** 2)
        updates, opt = tx.update(jax.grad(loss)(w), opt, w)
        return optax.apply_updates(w, updates), state, opt, normalized(w)

    opt, found = tx.init(w), []
    for key in jax.random.split(jax.random.key(1), steps):
        w, state, opt, used = step(w, state, opt, key)
        found.append(float(np.linalg.norm(np.float64(used), 2)))
    return found


class Transformer(nn.Module):
    """The four products of each layer and nothing between them."""

    layers: int
    wrap: Callable[..., nn.Module] = lambda module, name: module

    @nn.compact
    def __call__(self, x):
        n = x.shape[-1]
        for i in range(self.layers):
            for name, width in (("qkv", 3 * n), ("out", n), ("up", 4 * n), ("down", n)):
                dense = nn.Dense(width, use_bias=False, name=None if self.wrap is flax_wrap else f"layer{i}_{name}")
                dense = self.wrap(dense, f"layer{i}_{name}")
                x = dense(x, update_stats=True) if self.wrap is flax_wrap else dense(x)
                x = x[..., :n] if name == "qkv" else x
        return x


def flax_wrap(module: nn.Module, name: str) -> nn.Module:
    return nn.SpectralNorm(module, name=name)


def stack(layers: int, features: int, effort: Effort) -> dict[str, Any]:
    """Ratios ours / Flax for an updating forward pass: run time, time to trace and compile, lines of the program."""
    x, key = jnp.ones((8, features)), jax.random.key(0)
    models = {
        "ours": (jw.linen.Transformed(Transformer(layers), jw.SpectralNorm()), "weight_transform"),
        "theirs": (Transformer(layers, flax_wrap), "batch_stats"),
    }
    runs, compiles, lines = {}, {}, {}
    for name, (model, collection) in models.items():
        variables = jax.jit(model.init)(key, x)
        step = lambda v, model=model, collection=collection: model.apply(v, x, mutable=[collection])
        for _ in range(3):
            variables = variables | jax.jit(step)(variables)[1]
        runs[name], compiles[name] = function(step, variables), compilation(step, variables)
        lines[name] = len(jax.jit(step).lower(variables).compile().as_text().splitlines())
    found = {
        "step": compare(runs["ours"], runs["theirs"], effort),
        "trace and compile": compare(
            compiles["ours"], compiles["theirs"], dataclasses.replace(effort, rounds=min(effort.rounds, 3))
        ),
    }
    out = {
        n: {**dataclasses.asdict(c.ratio), "ours_s": c.ours.median, "theirs_s": c.theirs.median}
        for n, c in found.items()
    }
    return out | {
        "program": {"median": lines["ours"] / lines["theirs"], "ours": lines["ours"], "theirs": lines["theirs"]}
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    effort = Effort(2, 0.1) if options.quick else Effort(20, 20)
    console = terminal()
    report: dict[str, Any] = {"environment": environment("torch"), "quick": options.quick}
    with console.status("σ after each update"):
        report["errors"] = errors(1 if options.quick else 64)
    with console.status("time of an update"):
        of = programs()
        timed = {other: compare(of["jaxweights"], of[other], effort) for other in ("Flax", "torch")}
        report["update"] = {other: dataclasses.asdict(c) for other, c in timed.items()}
    with console.status("tracking AdamW"):
        report["tracking"] = tracking(5 if options.quick else 50)
    with console.status("48 kernels"):
        report["stack"] = stack(*((1, 32) if options.quick else (12, 256)), effort)
    for each in tables(report):
        console.print(each)
    write(report, options.out, "spectral_norm", draw)


def tables(report: dict[str, Any]) -> list[Table]:
    of = Table(title="σ of 512×256 Gaussians, and of a kernel under AdamW", title_justify="left")
    for heading in (
        "",
        "error after 1",
        "after 5",
        "after 20",
        "an update",
        "ours / it",
        "furthest σ of the kernel used",
    ):
        of.add_column(heading, justify="right" if heading else "left")
    times = seconds_of(report)
    for name, e in report["errors"].items():
        ratio, used = report["update"].get(name, {}).get("ratio"), report["tracking"].get(name)
        of.add_row(
            name,
            *(f"{100 * e[i]:.2g}%" for i in (0, 4, 19)),
            f"{1e6 * times[name]:.0f} µs",
            f"{ratio['median']:.2f} \\[{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
            f"{max(used, key=lambda s: abs(s - 1)):.3f}" if used else "",
        )
    stacked = Table(title="48 kernels: linen.Transformed over a wrapper of Flax around each", title_justify="left")
    for heading in ("", "ratio", "ours", "Flax's"):
        stacked.add_column(heading, justify="right" if heading else "left")
    for name, r in report["stack"].items():
        values = (f"{r['ours']:,} lines", f"{r['theirs']:,} lines") if "ours" in r else ()
        values = values or (f"{1e3 * r['ours_s']:.1f} ms", f"{1e3 * r['theirs_s']:.1f} ms")
        stacked.add_row(name, f"{r['median']:.2f}", *values)
    return [of, stacked]


def seconds_of(report: dict[str, Any]) -> dict[str, float]:
    """Seconds per update, per library."""
    update = report["update"]
    return {"jaxweights": update["Flax"]["ours"]["median"], **{n: u["theirs"]["median"] for n, u in update.items()}}


def draw(report: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", width_ratios=(1, 1, 1, 0.9))
    by_update, by_time, tracked, bars = panels
    times = seconds_of(report)
    for name, e in report["errors"].items():
        updates, percent = np.arange(1, len(e) + 1), 100 * np.maximum(e, 1e-8)
        by_update.plot(updates, percent, color=COLORS[name], lw=2, label=name)
        by_time.plot(1e3 * times[name] * updates, percent, color=COLORS[name], lw=2)
    by_update.axhline(0.05, color="0.6", lw=1, ls=":")
    by_update.set(yscale="log", xlabel="updates of one step", ylabel="mean error of σ, %", title="512 × 256 Gaussians")
    by_time.set(yscale="log", xscale="log", xlabel="milliseconds", title="the same by time")
    by_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_time.xaxis.set_major_formatter("{x:g}")
    by_time.xaxis.set_minor_formatter(NullFormatter())
    by_update.legend(frameon=False)
    for name, sigmas in report["tracking"].items():
        tracked.plot(np.arange(1, len(sigmas) + 1), sigmas, color=COLORS[name], lw=2, label=name)
    tracked.axhspan(0.98, 1.02, color="0.92")
    tracked.set(xlabel="step of AdamW, learning rate .01", title="σ of the kernel used")
    names = list(report["stack"])
    medians = [report["stack"][n]["median"] for n in names]
    bar = bars.barh(
        ["forward", "trace and\ncompile", "lines of\nprogram"], medians, color=COLORS["jaxweights"], height=0.55
    )
    bars.bar_label(bar, fmt="%.2f", padding=3)
    bars.axvline(1, color="black", lw=0.8, ls=":")
    bars.invert_yaxis()
    bars.set(title="48 kernels: ours / Flax's", xlim=(0, 1.2 * max(1, *medians)))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.93")
        panel.set_axisbelow(True)
    e = report["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("jax", "flax", "torch"))
    figure.suptitle(f"Spectral normalization: {e['device']}, {versions}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
