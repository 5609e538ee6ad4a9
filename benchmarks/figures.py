"""The figures of README.md and of docs/measurements, written from the committed results.

A region of a page stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; the function of that name
writes what is in it. The words around it are written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from compression_figures import (
    clustering,
    command_memory,
    compressed_minilm,
    low_bit,
    low_bit_tpu,
    quantization_times,
    quantized_layers,
    quantized_minilm,
    quantized_mobilenet,
    shared_products,
    sharing_applied,
)
from deep_compression_figures import deep_compression, other_ways
from reports import FILES, column, number, read, table

REGION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.S)


def render(text: str) -> str:
    """Returns the text with every region written anew."""
    return REGION.sub(lambda region: f"{region[1]}\n{written(region[2])}\n\n{region[3]}", text)


def written(name: str) -> str:
    """What belongs in a region: that it is missing, where its benchmark has left no results."""
    try:
        return REGIONS[name]()
    except FileNotFoundError as missing:
        return f"Not measured yet: `python benchmarks/{Path(missing.filename).stem}.py`."


def versions() -> str:
    """The device and the versions, which must be the same for all results."""
    found: dict[str, list[str]] = {}
    for name in (name for name, path in FILES.items() if path.exists()):
        e = read(name)["environment"]
        packages = ", ".join(f"{package} {e[package]}" for package in ("jax", "flax", "optax"))
        found.setdefault(f"{e['device'].removeprefix('cpu, ')}, Python {e['python']}, {packages}", []).append(name)
    if len(found) > 1:
        raise ValueError(f"The pages quote results of different devices or versions: {found}. Remake the older ones.")
    return next(iter(found))


def headlines() -> str:
    """One strong figure of each page, beside what it is to be compared with, and the script that makes it."""
    quantized = {(r["format"], r["method"]): r for r in read("quantization")["minilm"]}
    four, nearest, dense = (
        quantized[key] for key in (("4 bits", "GPTQ"), ("4 bits", "round to nearest"), ("float32", ""))
    )
    cosines = {method: found["2:4"] for method, found in read("minilm")["results"].items()}
    sparse = {m: 100 * np.mean(found["98%"]) for m, found in read("sparse_training")["results"].items() if m != "dense"}
    sigma = {peer: f"{number(100 * errors[-1])}%" for peer, errors in read("spectral_norm")["errors"].items()}
    run = {(r["name"], r["against"]): r["ratio"]["median"] for r in read("cpu")["results"]}
    masks = {(r["other"], r["dtype"], r["size"]): r["speedup"]["median"] for r in read("selection")["results"]}
    rows = [
        (
            "MiniLM-L6 in 4 bits by GPTQ: cosine to its embeddings in float32, and its file",
            f"{four['cosine']:.3f}, {four['file'] / 1e6:.0f} MB",
            f"round to nearest: {nearest['cosine']:.3f}; float32: {dense['file'] / 1e6:.0f} MB",
            "quantization",
        ),
        (
            "MiniLM-L6 pruned to 2:4 by SparseGPT and repair: cosine to its dense embeddings",
            f"{cosines['SparseGPT + repair']:.3f}",
            f"by magnitude: {cosines['magnitude']:.3f}",
            "minilm",
        ),
        (
            "a CNN trained with 98% zeros by RigL: accuracy on digits",
            f"{sparse['RigL']:.1f}%",
            f"pruned once, halfway: {sparse['one-shot']:.1f}%",
            "sparse_training",
        ),
        (
            "spectral norm: mean error of σ after 20 updates of one step",
            sigma["jaxweights"],
            f"Flax: {sigma['Flax']}; torch: {sigma['torch']}",
            "spectral_norm",
        ),
        (
            "a step of Adam, weight decay, and a projection to a box and a mask: time",
            f"{run['decay, project: clip, mask', 'Adam']:.2f}",
            "Adam alone: 1",
            "cpu",
        ),
        (
            "the mask of the smallest 90% of 100 million weights: time",
            f"{masks['argsort', 'float32', 10**8]:.3f}",
            "by a stable argsort: 1",
            "selection",
        ),
    ]
    measured, ours, others, names = zip(*rows, strict=True)
    scripts = [f"`{read(name)['command'].removeprefix('python ')}`" for name in names]
    columns = [["measured", *measured], ["jaxweights", *ours], ["others", *others], ["run with python", *scripts]]
    return table(columns, words=4)


def minilm() -> str:
    results = read("minilm")["results"]
    columns = [column(p, [cosines[p] for cosines in results.values()], ".3f", max) for p in results["magnitude"]]
    return table([["zeros", *(method.replace(" + repair", ", repaired") for method in results)], *columns])


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


REGIONS = {
    f.__name__: f
    for f in (
        *(versions, headlines, minilm, sparse_training, gan, stochastic_rounding, accuracy, speed, clients),
        *(compressed_minilm, command_memory, quantized_minilm, quantized_mobilenet, quantized_layers),
        *(quantization_times, low_bit, low_bit_tpu),
        *(clustering, shared_products, sharing_applied, deep_compression, other_ways),
    )
}
