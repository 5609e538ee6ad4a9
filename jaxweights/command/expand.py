"""`jaxweights expand`: plain arrays of the stored weights of a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make plain arrays of the stored weights of a file"
DESCRIPTION = """\
Makes plain arrays of all stored weights of a file, whatever made it: `jaxweights compress`, GPTQ, AWQ, llama.cpp, ...

OUT ends in .safetensors, .gguf or .npz. What `jaxweights compress` wrote gets the names, shapes and dtypes of the model
that it was made from. NumPy has no bfloat16 and no 8-bit floats: in .npz they become float32."""
EPILOG = """\
examples:
  jaxweights expand small.safetensors -o model.safetensors
  jaxweights expand llama-Q4_K_M.gguf -o llama.npz"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "expand",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the model: safetensors, GGUF, a folder, .npz, Orbax")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from jaxweights.command.expanding import expand  # imports JAX

    expand(Path(options.file), Path(options.out), force=options.force)
    return 0
