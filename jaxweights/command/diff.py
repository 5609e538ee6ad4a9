"""`jaxweights diff`: compares the weights of two files."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "compare the weights of two files"
DESCRIPTION = """\
Compares the weights of two files by name: what only one of them has, what changed its shape or dtype, and how far the
values moved. A and B are as for `jaxweights inspect`, of the same kind or not: a quantized weight is compared as the
weight that it stands for. Tensors are read one at a time; the table is printed when all of them were compared.

The exit code is that of diff(1): 0 if all names, shapes, dtypes and values are the same, 1 if something is different,
2 if a file cannot be read.

columns:
  change     "only in A", "only in B", "shape", "dtype" or "values"; "dtype" alone means that the values are the same
  error      ‖B − A‖ / ‖A‖
  cosine     of the angle between A and B
  max |Δ|    the largest difference of two entries
  SNR        −20 log₁₀ of the error, in dB: each bit of precision gives about 6
  bytes      in the files

Names are compared as they are, and so are shapes: the "weight" (out, in) of PyTorch is not the "kernel" (in, out) of
Flax, and llama.cpp has names of its own."""
EPILOG = """\
examples:
  jaxweights diff model.safetensors small.safetensors
  jaxweights diff before.safetensors after.safetensors --where "*attention*"
  jaxweights diff a.npz b.npz > /dev/null && echo same
  jaxweights diff a.gguf b.gguf --json | jq '.tensors[] | select(.error > 0.1) | .name'"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "diff",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="one model")
    parser.add_argument("b", metavar="B", help="the other")
    parser.add_argument("--where", metavar="GLOB", action="append", help="names to compare, as *attn*; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, with the tensors that are the same")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from jaxweights.command.comparing import compare

    return int(compare(options.a, options.b, options.where, json=options.json))
