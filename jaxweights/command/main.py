"""The command `jaxweights`: reads the command line and runs a subcommand."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

COMMANDS = ("inspect", "diff", "compress", "expand")
"""The subcommands, each a module beside this one with `add_parser` and `run`. They import JAX only in `run`."""
DESCRIPTION = "Looks at the weights of a trained model in a file, and makes them smaller."
EPILOG = """\
files: .safetensors, .gguf, .safetensors.index.json, .npz, a folder with a model in safetensors, an Orbax checkpoint

examples:
  jaxweights inspect model.safetensors                    what is in it: shapes, dtypes, zeros, σ, outliers, bytes
  jaxweights inspect model.gguf --plot model.png          the same as a page of pictures
  jaxweights compress model.safetensors -o small.safetensors --bits 4 --block 128
  jaxweights diff model.safetensors small.safetensors     how far the weights moved
  jaxweights expand small.safetensors -o plain.safetensors

`jaxweights COMMAND --help` tells all of a command."""
ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
"""Exit codes of every subcommand; the last two as the shell has them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Errors go to stderr in one line, with exit code 2.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # it may lack "σ"; stderr escapes what it lacks
    options = _parser().parse_args(argv)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"jaxweights {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as e:
        print(f"jaxweights {options.command}: error: {_reason(e)}", file=sys.stderr)
        return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxweights",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"jaxweights.command.{name}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Prints the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from jaxweights import __version__

        print(f"jaxweights {__version__}")
        parser.exit()


def _reason(error: BaseException) -> str:
    """The message of an error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
