"""The figures of README.md, written from the committed results.

A region of the README stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; the function of that name
below writes what is in it. The words around it are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES, RESULTS = (Path(__file__).parents[1] / folder for folder in ("examples", "benchmarks/results"))
FILES = {
    **{
        name: RESULTS / f"{name}.json"
        for name in (
            "cpu",
            "spectral_norm",
            "norms",
            "selection",
            "bf16_training",
            "clients",
            "quantization",
            "low_bit",
        )
    },
    **{
        name: EXAMPLES / f"{name}.json"
        for name in ("minilm", "compress_minilm", "sparse_training", "gan_digits", "gan_fashion_mnist")
    },
}
"""The results that the README quotes."""
REGION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.S)


def render(text: str) -> str:
    """Returns the text with every region written anew."""
    return REGION.sub(lambda region: f"{region[1]}\n{REGIONS[region[2]]()}\n\n{region[3]}", text)


def read(name: str) -> dict[str, Any]:
    return json.loads(FILES[name].read_text())


def table(columns: list[list[str]], words: int = 1) -> str:
    """Returns a Markdown table of columns that start with their headings. The first `words` columns are text."""
    heading, *rows = zip(*columns, strict=True)
    sides = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, sides, *rows))


def column(heading: str, values: Iterable[float], form: str, best: Callable) -> list[str]:
    """Returns a column with its best values in bold."""
    shown = [format(v, form) for v in values]
    return [heading, *(f"**{s}**" if float(s) == best(map(float, shown)) else s for s in shown)]


def number(x: float) -> str:
    """Returns two digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}".replace("e-0", "e-")


def versions() -> str:
    """The device and the versions, which must be the same for all results."""
    found: dict[str, list[str]] = {}
    for name in FILES:
        e = read(name)["environment"]
        packages = ", ".join(f"{package} {e[package]}" for package in ("jax", "flax", "optax"))
        found.setdefault(f"{e['device'].removeprefix('cpu, ')}, Python {e['python']}, {packages}", []).append(name)
    if len(found) > 1:
        raise ValueError(f"The README quotes results of different devices or versions: {found}. Remake the older ones.")
    return next(iter(found))


def minilm() -> str:
    results = read("minilm")["results"]
    columns = [column(p, [cosines[p] for cosines in results.values()], ".3f", max) for p in results["magnitude"]]
    return table([["zeros", *(method.replace(" + repair", ", repaired") for method in results)], *columns])


def compressed_minilm() -> str:
    results = read("compress_minilm")["results"]
    dense = results["float32"]["bytes"]
    size = lambda n: [f"{n / 1e6:.1f}", f"{dense / n:.1f}"]
    rows = [[name, *size(r["bytes"]), f"{r['cosine']:.4f}"] for name, r in results.items()]
    return table([list(c) for c in zip(["recipe", "file, MB", "times smaller", "cosine"], *rows, strict=True)])


def sparse_training() -> str:
    results = read("sparse_training")["results"]
    dense, methods = 100 * np.array(results["dense"]["0%"]), [m for m in results if m != "dense"]
    columns = [["zeros", *methods, "dense"]]
    for zeros in results["RigL"]:
        accuracy = 100 * np.array([results[m][zeros] for m in methods])  # (method, seed)
        heading, *means = column(zeros, accuracy.mean(1), ".1f", max)
        spread = [f"{mean} ± {std:.1f}" for mean, std in zip(means, accuracy.std(1), strict=True)]
        columns.append([heading, *spread, f"{dense.mean():.1f} ± {dense.std():.1f}"])
    return table(columns)


def gan() -> str:
    digits, fashion = (read(f"gan_{data}")["results"] for data in ("digits", "fashion_mnist"))
    slopes = [format(r["slope"], ".3g") for r in digits.values()]
    names = [name if name == "clipping" else f"`{name}`" for name in digits]
    columns = [["critic", *names, "(real images, held out)"], ["slope at most: digits", *slopes, ""]]
    for data, results in (("digits", digits), ("Fashion-MNIST", fashion)):
        of_critics = column(f"Fréchet distance: {data}", [r["distance"] for r in results.values()], ".1f", min)
        columns.append([*of_critics, number(results["clipping"]["held_out"])])
    return table(columns)


def stochastic_rounding() -> str:
    results = read("bf16_training")["results"]
    names = [name.replace("round_stochastically", "`round_stochastically`") for name in results]
    columns = [["weights", *names]]
    for heading, part in (("training loss", "train"), ("held-out loss", "held_out")):
        last = [np.mean([curve[-1] for curve in losses[part]]) for losses in results.values()]  # the mean of the seeds
        columns.append([heading, *(f"{loss:.4f}" for loss in last)])
    return table(columns)


def accuracy() -> str:
    spectral, norms = read("spectral_norm"), read("norms")
    shape = next(iter(norms["errors"]))
    stored = norms["results"]["layer norm, 16384 × 1024"]["stored"]
    rows = {
        "σ̂ after 20 updates of one step, 512 × 256 Gaussians: mean error": {
            peer: f"{number(100 * errors[-1])}%" for peer, errors in spectral["errors"].items()
        },
        "σ of a kernel under AdamW at a learning rate of 0.01: farthest from 1": {
            peer: f"{max(sigmas, key=lambda s: abs(s - 1)):.3f}" for peer, sigmas in spectral["tracking"].items()
        },
        "layer norm at mean 10⁴ and deviation 1, float32: largest error": {
            peer: number(errors[-1]) for peer, errors in norms["errors"][shape].items()
        },
        "what layer norm keeps for its gradient, in sizes of x": {peer: f"{s:.2f}" for peer, s in stored.items()},
    }
    peers = ("jaxweights", "Flax", "torch")
    return table([["", *rows], *([peer, *(found.get(peer, "") for found in rows.values())] for peer in peers)])


def speed() -> str:
    run = {(r["group"], r["name"], r["against"]): r["ratio"]["median"] for r in read("cpu")["results"]}
    masks = {(r["other"], r["dtype"], r["size"]): r["speedup"]["median"] for r in read("selection")["results"]}
    update, stack = read("spectral_norm")["update"], read("spectral_norm")["stack"]
    applied = lambda *names: [run["apply", name, "a scaled copy"] for name in names]
    step = lambda what, against="Adam": [run["Adam step", what, against]]
    modules = lambda name: [run["Linen step", name, f"nn.{name}"], run["NNX step", name, f"nnx.{name}"]]
    compiled = lambda *names: [run["compilation, 100 leaves", name, "a loop over leaves"] for name in names]
    counted = lambda other: [masks[other, "float32", size] for size in (10**7, 10**8)]
    rows: list[tuple[str, str, list[float]]] = [
        (
            "`ClipWeights`, `Sparsify`, `Prune` on a tree of 100M weights",
            "a scaled copy of the tree",
            applied("ClipWeights", "Sparsify", "Prune"),
        ),
        ("`ClipNorm`, `WeightNorm` on it", "a scaled copy of the tree", applied("ClipNorm", "WeightNorm")),
        ("Adam, decay, then `on_tree(...).apply` of a clip and a mask", "Adam", step("decay, then apply: clip, mask")),
        ("Adam, decay, `project` of a clip and a mask", "Adam", step("decay, project: clip, mask")),
        (
            "the same in bfloat16",
            "Adam in bfloat16",
            step("decay, project: clip, mask, in bfloat16", "Adam in bfloat16"),
        ),
        (
            "a training step of `linen.Transformed`, `nnx.transformed` with `WeightNorm`",
            "`nn.WeightNorm`, `nnx.WeightNorm`",
            modules("WeightNorm"),
        ),
        ("the same with `SpectralNorm`", "`nn.SpectralNorm`, `nnx.SpectralNorm`", modules("SpectralNorm")),
        (
            "an update of `SpectralNorm` for 512 × 256 weights",
            "Flax's, torch's",
            [update[peer]["ratio"]["median"] for peer in ("Flax", "torch")],
        ),
        (
            "48 kernels with `SpectralNorm`: a forward pass that updates it; its trace and compilation",
            "48 wrappers of `nn.SpectralNorm`",
            [stack[what]["median"] for what in ("step", "trace and compile")],
        ),
        (
            "trace and compilation of `SpectralNorm`, of a scheduled `Prune`, on a tree of 100 weights",
            "a loop over the weights",
            compiled("SpectralNorm", "Prune on a schedule"),
        ),
        ("the mask of the smallest 90% of 10M, of 100M float32 weights", "a stable argsort", counted("argsort")),
        ("the same", "`lax.top_k`", counted("top_k")),
    ]
    ours, against, ratios = zip(*rows, strict=True)
    shown = [", ".join(f"{r:.2f}" if r >= 0.1 else f"{r:.3f}" for r in of) for of in ratios]
    return table([["ours", *ours], ["against", *against], ["ratio", *shown]], words=2)


def clients() -> str:
    rows = read("clients")["results"]
    columns = {
        "model": [f"{r['package']}: {r['name']}" for r in rows],
        "one line": [f"`{r['line']}`" for r in rows],
        "kernels": [f"{r['kernels']}" for r in rows],
        "σ − 1 with the layout": [number(r["with"]) for r in rows],
        "without": [number(r["without"]) for r in rows],
        "warnings": [f"{r['warnings']}" for r in rows],
    }
    return table([[heading, *cells] for heading, cells in columns.items()], words=2)


def quantized_minilm() -> str:
    report = read("quantization")
    rows = [r for r in report["minilm"] if r["method"]]
    ratios = {(r["format"], tuple(r["shape"])): f"{r['ratio']['median']:.2f}" for r in report["minilm_times"]}
    shapes = list(dict.fromkeys(shape for _, shape in ratios))
    formats = list(dict.fromkeys(r["format"] for r in rows))
    of_nearest = {r["format"]: r for r in rows if r["method"] == "round to nearest"}
    columns = [
        ["format", *formats],
        ["bits a weight", *(f"{of_nearest[name]['bits']:.2f}" for name in formats)],
        ["file, MB", *(f"{of_nearest[name]['file'] / 1e6:.1f}" for name in formats)],
        *by_method(rows, "cosine", "{:.4f}"),
        *(
            [f"time, {n} × {length} tokens", *(ratios.get((f, (n, length)), "") for f in formats)]
            for n, length in shapes
        ),
    ]
    return table(columns)


def quantized_mobilenet() -> str:
    rows = read("quantization")["mobilenet"]
    agreement, snr = by_method(rows, "agreement", "{:.1%}"), by_method(rows, "snr", "{:.1f} dB")
    cells = [
        [name, *map(", ".join, zip(a, b, strict=True))] for (name, *a), (_, *b) in zip(agreement, snr, strict=True)
    ]
    return table([["format", *dict.fromkeys(r["format"] for r in rows)], *cells])


def quantized_layers() -> str:
    report = read("quantization")
    formats = list(dict.fromkeys(r["format"] for r in report["layers"]))
    rows = sorted(report["layers"], key=lambda r: formats.index(r["format"]))
    rows = [r for r in rows if r["format"].startswith("int") or r["method"] == "round to nearest"]
    layers = list(dict.fromkeys(r["layer"] for r in report["layers"]))
    found = {(r["format"], r["package"], r["method"], r["layer"]): r for r in rows}
    keys = list(dict.fromkeys(key[:3] for key in found))
    times = {(r["format"], r["package"], "round to nearest"): r for r in report["layer_times"]}

    def time(key: tuple[str, str, str], n: str) -> str:
        products = times[key]["products"] if key in times else {}
        return f"{products[n]['ratio']['median']:.2f}" if n in products else ""

    columns = [[heading, *(key[i] for key in keys)] for i, heading in enumerate(("format", "package", "method"))]
    bits = [next(r["bits"] for r in rows if (r["format"], r["package"], r["method"]) == key) for key in keys]
    columns.append(["bits a weight", *(f"{b:.2f}" for b in bits)])
    for layer in layers:
        of_layer = [found.get((*key, layer)) for key in keys]
        columns.append([f"error of the outputs: {layer}", *(f"{r['output']:.4f}" if r else "" for r in of_layer)])
    columns.append(["to round, ms", *(f"{times[k]['quantize_ms']:.0f}" if k in times else "" for k in keys)])
    columns += [[f"x @ w, {n} row{'s' if n > '1' else ''}", *(time(key, n) for key in keys)] for n in ("1", "16")]
    return table(columns, words=3)


def low_bit() -> str:
    results = read("low_bit")["results"]
    formats, rows = (list(dict.fromkeys(r[key] for r in results)) for key in ("format", "rows"))
    found = {(r["format"], r["rows"]): f"{r['ratio']['median']:.2f}" for r in results}
    bytes_of = {r["format"]: f"{r['bytes']:.2f}" for r in results}
    columns = [[f"{n} row{'s' * (n > 1)}", *(found.get((f, n), "") for f in formats)] for n in rows]
    return table([["format", *formats], ["bytes", *map(bytes_of.__getitem__, formats)], *columns])


def by_method(rows: list[dict[str, Any]], key: str, form: str) -> list[list[str]]:
    """A column for each method and a line for each format, the best in bold."""
    formats = list(dict.fromkeys(r["format"] for r in rows))
    found = {(r["format"], r["method"]): form.format(r[key]) for r in rows}
    best = {f: form.format(max(r[key] for r in rows if r["format"] == f)) for f in formats}
    marked = lambda cell, f: f"**{cell}**" if cell == best[f] else cell
    methods = dict.fromkeys(r["method"] for r in rows)
    return [[m, *(marked(found.get((f, m), ""), f) for f in formats)] for m in methods]


REGIONS = {
    f.__name__: f
    for f in (
        *(versions, minilm, sparse_training, gan, stochastic_rounding, accuracy, speed, clients),
        *(compressed_minilm, quantized_minilm, quantized_mobilenet, quantized_layers, low_bit),
    )
}
