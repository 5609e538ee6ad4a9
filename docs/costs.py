"""What techniques cost, as Markdown: figures of benchmarks/results, and sizes of states computed here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxweights as jw

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import figures  # noqa: E402

KERNEL = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
GRADUAL = optax.polynomial_schedule(0.0, 0.9, 3, 1000)
TRANSFORMS = {
    "`ClipWeights`": ("ClipWeights", jw.ClipWeights(1.0)),
    "`ClipNorm`": ("ClipNorm", jw.ClipNorm(1.0)),
    "`WeightNorm`": ("WeightNorm", jw.WeightNorm()),
    "`SpectralNorm`": ("SpectralNorm", jw.SpectralNorm()),
    "`Sparsify`": ("Sparsify", jw.Sparsify(0.1)),
    "`Prune`": ("Prune", jw.Prune(0.9)),
    "`FakeQuantize`": ("FakeQuantize", jw.FakeQuantize(8)),
    "`ShareWeights`": ("ShareWeights", jw.ShareWeights(16)),
}


def by_command(*tables: tuple[str, str]) -> str:
    """Tables, each under the command that makes its figures anew."""
    return "\n\n".join(f"{table}\n\nFrom `{command}`, {device()}." for command, table in tables)


def device() -> str:
    return "on " + json.loads(figures.FILES["cpu"].read_text())["environment"]["device"].removeprefix("cpu, ")


def state_size(transform: jw.Transform) -> float:
    """Bytes of the state over bytes of the weight, for a kernel of 4096 × 4096 float32."""
    state = jax.eval_shape(transform.init, KERNEL, jax.random.key(0))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)) / (4 * math.prod(KERNEL.shape))


def percent(x: float) -> str:
    return "0" if x == 0 else f"{100 * x:.2g}%" if x < 0.1 else f"{100 * x:.0f}%"


def transforms() -> str:
    """Time, state and temporary memory of each transform."""
    report = figures.read("cpu")
    ratio = {(r["group"], r["name"]): r["ratio"]["median"] for r in report["results"]}
    columns = [
        ["transform", *TRANSFORMS],
        ["apply, × a scaled copy", *(f"{ratio['apply', name]:.2f}" for name, _ in TRANSFORMS.values())],
        ["state", *(percent(state_size(t)) for _, t in TRANSFORMS.values())],
        [
            "temporary memory",
            *(percent(ratio["temporary memory", f"{name}, apply"]) for name, _ in TRANSFORMS.values()),
        ],
    ]
    return by_command((report["command"], figures.table(columns)))


def steps() -> str:
    """What a training step takes with a technique, over one without."""
    report = figures.read("cpu")
    ratio = {(r["group"], r["name"], r["against"]): r["ratio"]["median"] for r in report["results"]}
    rows = {
        "`project` of a clip, in a step of Adam": ("Adam step", "project: clip", "Adam"),
        "`project` of a mask": ("Adam step", "project: mask", "Adam"),
        "decay, `project` of a clip and a mask": ("Adam step", "decay, project: clip, mask", "Adam"),
        "decay, then `on_tree(...).apply` of both": ("Adam step", "decay, then apply: clip, mask", "Adam"),
        "`jw.linen.Transformed` with `SpectralNorm`": ("Linen step", "SpectralNorm", "nn.SpectralNorm"),
        "`jw.linen.Transformed` with `WeightNorm`": ("Linen step", "WeightNorm", "nn.WeightNorm"),
        "`jw.nnx.transformed` with `SpectralNorm`": ("NNX step", "SpectralNorm", "nnx.SpectralNorm"),
        "`jw.nnx.transformed` with `WeightNorm`": ("NNX step", "WeightNorm", "nnx.WeightNorm"),
    }
    against = [f"`{key[2]}`" if "." in key[2] else key[2] for key in rows.values()]
    columns = [["step", *rows], ["against", *against], ["time", *(f"{ratio[key]:.2f}" for key in rows.values())]]
    return by_command((report["command"], figures.table(columns, words=2)))


def low_bit() -> str:
    return by_command((figures.read("low_bit")["command"], figures.low_bit()))


def quantized_minilm() -> str:
    return by_command((figures.read("quantization")["command"], figures.quantized_minilm()))


def minilm() -> str:
    return by_command((figures.read("minilm")["command"], figures.minilm()))


def sparse_training() -> str:
    return by_command((figures.read("sparse_training")["command"], figures.sparse_training()))


def gan() -> str:
    command = figures.read("gan_digits")["command"]
    return by_command((f"{command}` and `{command} --data fashion-mnist", figures.gan()))


def stochastic_rounding() -> str:
    return by_command((figures.read("bf16_training")["command"], figures.stochastic_rounding()))


def accuracy() -> str:
    return by_command(("python benchmarks/spectral_norm.py` and `python benchmarks/norms.py", figures.accuracy()))
