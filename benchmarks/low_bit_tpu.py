"""Memory of products with quantized weights on a TPU v5e, without one: python benchmarks/low_bit_tpu.py [--quick].

Compiles x @ w ahead of time, which needs libtpu, and reads what the compiler says of the program: temporaries in the
memory of the device (HBM), and bytes accessed over those of the arguments. The latter count the memory of the chip too,
where scales of 8 and 16 bits are widened; the bytes of HBM alone are counted in the text of the program. No times:
nothing runs.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.table import Table
from script import environment, parser, terminal

import jaxweights as jw
from jaxweights.formats import integers

FORMATS: dict[str, Any] = {
    "int8 per unit": 8,
    "int8, g128": integers(8, block=128),
    "int4, g128": integers(4, block=128),
    "int4, zeros, g128": integers(4, block=128, symmetric=False),
    "int4, g32, f16 scales": integers(4, block=32, scale="float16"),
    **{name: name for name in ("nf4", "fp8_e4m3", "mxfp4", "mxfp8", "nvfp4", "ternary", "binary")},
    "int2, g64": integers(2, block=64),
    "int3, g128": integers(3, block=128),
}
CLUSTERS = {"16 clusters": 16, "64 clusters": 64, "256 clusters": 256}
SHAPES = ((8192, 28672), (28672, 8192))
BITS = {"pred": 8, "s32": 32, "u32": 32, "f32": 32, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def main() -> None:
    options = parser(__doc__).parse_args()
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    console, results = terminal(), []
    for shape in ((1024, 2048),) if options.quick else SHAPES:
        for name, format in (FORMATS | CLUSTERS).items():
            for n in (1, 16):
                with console.status(f"{name}, {shape}, batch {n}"):
                    store = clusters if name in CLUSTERS else jw.quantize
                    results.append(
                        {"format": name, "shape": shape, "batch": n} | measure(store, format, shape, n, device)
                    )
    table = Table(title="x @ w compiled for a TPU v5e")
    for heading in (
        "format",
        "weight",
        "batch",
        "weight, MB",
        "temporaries, MB",
        "bytes / arguments",
        "of HBM",
        "compile, s",
    ):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for r in results:
        sizes = (f"{r[name] / 1e6:.1f}" for name in ("stored", "temporary"))
        ratios = ("in a loop" if r["loop"] else f"{r[name] / r['arguments']:.2f}" for name in ("accessed", "of_hbm"))
        table.add_row(
            r["format"], "x".join(map(str, r["shape"])), str(r["batch"]), *sizes, *ratios, f"{r['compile_s']:.1f}"
        )
    console.print(table)
    report = {"command": "python benchmarks/low_bit_tpu.py", "quick": options.quick, "target": "TPU v5e"}
    report |= {"environment": environment("libtpu"), "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"low_bit_tpu{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


def clusters(w: jax.Array, n: int) -> Any:
    return jw.store_clusters(w[0, :n], jnp.zeros(w.shape, jnp.int8), has_zeros=False)


def measure(store: Any, format: Any, shape: tuple[int, int], n: int, device: Any) -> dict[str, Any]:
    """Returns bytes: of the weight, the arguments, the temporaries, and what is read and written."""

    def place(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    q = jax.eval_shape(lambda w: store(w, format), jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((n, shape[0]), jnp.float32)
    start = time.perf_counter()
    compiled = jax.jit(jw.matmul).lower(place(x), jax.tree.map(place, q)).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "stored": q.nbytes,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "accessed": compiled.cost_analysis()["bytes accessed"],
        "of_hbm": bytes_of_hbm(text),
        "loop": " while(" in text,  # whose body the compiler counts once
        "compile_s": seconds,
    }


def bytes_of_hbm(text: str) -> int:
    """What the operations of the main computation read and write outside the memory of the chip, S(1) in its text."""
    sizes, total = {}, 0
    for line in text[text.index("\nENTRY") :].splitlines():
        match = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z-]+)\((.*)", line)
        if match:
            name, shapes, operation, rest = match.groups()
            sizes[name] = sum(map(size, re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shapes)))
            if operation not in FREE and not operation.endswith("-done"):
                total += sizes[name] + sum(sizes.get(operand, 0) for operand in set(re.findall(r"%([\w.-]+)", rest)))
    return total


def size(shape: str) -> int:
    """Bytes of an array in HBM, 0 if it is on the chip."""
    dtype, dims = re.match(r"(\w+)\[([\d,]*)\]", shape).groups()  # type: ignore[union-attr]
    return 0 if "S(" in shape else math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(dtype, 8) // 8


if __name__ == "__main__":
    main()
