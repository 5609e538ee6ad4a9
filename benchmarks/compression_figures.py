"""Tables of what is stored in fewer bits: quantized and clustered weights, and models made of them."""

from __future__ import annotations

from typing import Any

from reports import read, table


def compressed_minilm() -> str:
    results = read("compress_minilm")["results"]
    dense = results["float32"]["bytes"]
    size = lambda n: [f"{n / 1e6:.1f}", f"{dense / n:.1f}"]
    time = lambda r: f"{r['command_seconds']:.1f}" if "command_seconds" in r else ""
    rows = [[name, *size(r["bytes"]), f"{r['cosine']:.4f}", time(r)] for name, r in results.items()]
    heading = ["recipe", "file, MB", "times smaller", "cosine", "the command takes, s"]
    return table([list(c) for c in zip(heading, *rows, strict=True)])


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
    rows = [r for r in rows if r["format"].startswith(("int", "MXFP4")) or r["method"] == "round to nearest"]
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


def quantization_times() -> str:
    rows = read("quantization")["method_times"]
    seconds = {"with compiling, s": "first_seconds", "again, s": "seconds"}
    columns = [[key, *(r[key] for r in rows)] for key in ("package", "method")]
    return table([*columns, *([name, *(f"{r[key]:.1f}" for r in rows)] for name, key in seconds.items())], words=2)


def low_bit() -> str:
    results = read("low_bit")["results"]
    formats, rows = (list(dict.fromkeys(r[key] for r in results)) for key in ("format", "rows"))
    found = {(r["format"], r["rows"]): f"{r['ratio']['median']:.2f}" for r in results}
    bytes_of = {r["format"]: f"{r['bytes']:.2f}" for r in results}
    columns = [[f"{n} row{'s' * (n > 1)}", *(found.get((f, n), "") for f in formats)] for n in rows]
    return table([["format", *formats], ["bytes", *map(bytes_of.__getitem__, formats)], *columns])


def low_bit_tpu() -> str:
    """The larger batch needs the more memory, and a loop is counted once: neither the smaller nor loops are shown."""
    report = read("low_bit_tpu")
    first = report["results"][0]["shape"]
    rows = [r for r in report["results"] if r["shape"] == first and r["batch"] == 16]
    columns = {
        "format": [r["format"] for r in rows],
        "weight, MB": [f"{r['stored'] / 1e6:.0f}" for r in rows],
        "temporaries, MB": [f"{r['temporary'] / 1e6:.1f}" for r in rows],
        "bytes of HBM": ["" if r["loop"] else f"{r['of_hbm'] / r['arguments']:.2f}" for r in rows],
        "all bytes": ["" if r["loop"] else f"{r['accessed'] / r['arguments']:.2f}" for r in rows],
    }
    return table([[heading, *cells] for heading, cells in columns.items()])


def clustering() -> str:
    results = read("clustering")["results"]
    columns = {
        "method": [r["method"] for r in results],
        "values": [f"{r['size']:,}" for r in results],
        "clusters": [f"{r['clusters']}" for r in results],
        "seconds": [f"{r['seconds']:.2g}" for r in results],
        "time": [f"{r['ratio']['median']:.2f}" for r in results],
        "error": [f"{r['error']:.4f}" for r in results],
        "temporary memory": [f"{r['temporaries']:.2f}" if "temporaries" in r else "" for r in results],
    }
    return table([[heading, *cells] for heading, cells in columns.items()])


def shared_products() -> str:
    rows = read("sharing")["products"]
    columns = [["pattern", *(r["pattern"] for r in rows)], ["values", *(f"{r['values']:,}" for r in rows)]]
    for way, heading in (("forward", "x @ w"), ("gradient", "gradient")):
        columns.append([f"{heading}, ms", *(f"{r[way]['ours_ms']:.2g}" for r in rows)])
        columns.append([f"{heading}, dense, ms", *(f"{r[way]['theirs_ms']:.2g}" for r in rows)])
    return table(columns)


def sharing_applied() -> str:
    rows = read("sharing")["apply"]
    groups = list(dict.fromkeys(r["groups"] for r in rows))
    found = {(r["groups"], r["learned"]): f"{r['ratio']['median']:.2f}" for r in rows}
    columns = [["the value of a group", "the mean of its weights", "learned"]]
    columns += [[f"{n} groups", found[n, False], found[n, True]] for n in groups]
    return table(columns)


def command_memory() -> str:
    report = read("command_memory")
    size = report["model"]["bytes"]
    rows = [
        [f"`{name}`", f"{r['seconds']:.0f}", f"{size / 1e6 / r['seconds']:.0f}", f"{r['tensors']:.1f}"]
        for name, r in report["results"].items()
    ]
    return table([list(c) for c in zip(["command", "seconds", "MB/s", "peak, in tensors"], *rows, strict=True)])


def by_method(rows: list[dict[str, Any]], key: str, form: str) -> list[list[str]]:
    """A column for each method and a line for each format, the best in bold."""
    formats = list(dict.fromkeys(r["format"] for r in rows))
    found = {(r["format"], r["method"]): form.format(r[key]) for r in rows}
    best = {f: form.format(max(r[key] for r in rows if r["format"] == f)) for f in formats}
    marked = lambda cell, f: f"**{cell}**" if cell == best[f] else cell
    methods = dict.fromkeys(r["method"] for r in rows)
    return [[m, *(marked(found.get((f, m), ""), f) for f in formats)] for m in methods]
