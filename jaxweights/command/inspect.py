"""`jaxweights inspect`: shows the weights of a file."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "show the weights of a file"
DESCRIPTION = """\
Shows the weights of a model in a file: shape, dtype, density, σ, outliers and bytes of each, and totals.

FILE is .safetensors, .gguf, .safetensors.index.json, .npz, a folder with a model in safetensors, or a checkpoint of
Orbax. Weights of GPTQ, AWQ, compressed-tensors, bitsandbytes, MXFP4 and llama.cpp are shown as the weights that they
stand for. Nothing in a file is executed. Tensors are read one at a time; the table is printed when all of them were
read, so that a damaged file prints an error and nothing else.

columns:
  dtype      of a stored weight its format: "int4 g128" has 4 bits, and 128 inputs share a scale; "zp" zero points
  density    the share of entries that are not 0
  σ          the largest singular value of the matrix that a weight is read as: exact where a side is up to 512, beyond
             that by up to 32 steps of Lanczos' method. "≥" says that they did not converge: it is a lower bound, for
             random weights less than 1% below. Beyond 300 million entries there are fewer steps, to bound the time
  outliers   the share of entries more than 6 standard deviations from the mean of the tensor; of normally distributed
             weights that is 2 in a billion
  bytes      in the file

How a weight is read follows from names and shapes, not from the model: "weight" is (out, in, *window) as in PyTorch,
"kernel" (*window, in, out) as in Flax. σ of a matrix is the same either way. Where the reading changes σ and another
one fits as well, a "?" says so: a stack of matrices looks like a convolution."""
EPILOG = """\
examples:
  jaxweights inspect model.safetensors
  jaxweights inspect model.gguf --where "*attn*" --sort bytes
  jaxweights inspect checkpoint/ --json | jq '.tensors[] | select(.outliers > 1e-4) | .name'
  jaxweights inspect model.safetensors --plot model.png"""
ORDERS = ("file", "name", "bytes", "density", "sigma", "outliers")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the model")
    parser.add_argument("--where", metavar="GLOB", action="append", help="names to show, as *attn*; may be repeated")
    parser.add_argument("--sort", choices=ORDERS, default="file", help="the order; numbers from large to small")
    parser.add_argument("--json", action="store_true", help="print JSON, with more numbers")
    parser.add_argument("--plot", metavar="PNG", help="draw a page of pictures: .png, .svg or .pdf")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from jaxweights.command.inspecting import inspect

    inspect(options.file, options.where, options.sort, json=options.json, plot=options.plot)
    return 0
