"""`jaxweights compress`: prunes, quantizes and clusters the weights of a file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxweights.models.recipe import Recipe

HELP = "prune, quantize and cluster the weights of a file"
DESCRIPTION = """\
Prunes, quantizes and clusters the weights of a file, tensor by tensor, and writes a smaller file.

Matrices are compressed. Vectors, norms, biases and integers stay as they are; the summary says which and why.
FILE is as for `jaxweights inspect`: safetensors, GGUF, a folder, .npz or an Orbax checkpoint, of plain arrays.

OUT is a .safetensors or .gguf file. A model that is a folder may become a folder: its config.json gets the
quantization_config, its other files are copied.

The layout of OUT is one that other tools read, where there is one:
  --bits            compressed-tensors          compressed-tensors; with 4 and 8 bits vLLM, transformers
  --format nf4      bitsandbytes                transformers, vLLM
  --format mxfp4    mxfp4 as in gpt-oss         transformers
  --to gguf         Q4_0, Q5_0, Q8_0, MXFP4     llama.cpp, if FILE is GGUF: names and metadata stay those of FILE
  --prune alone     plain arrays with zeros     everything
Clusters, other formats, mixtures and entropy-coded files are in our own layout, which only jaxweights reads.
Loaders of compressed-tensors, bitsandbytes and mxfp4 replace linear layers, so that embeddings and lm_head stay as they
are there, unless a rule names them.

If the run is interrupted, the same command goes on where it stopped. Finished tensors are in .OUT.jaxweights beside
OUT, until OUT is whole or an error ends the run."""
EPILOG = """\
examples:
  jaxweights compress model.safetensors -o small.safetensors --bits 4 --block 128
  jaxweights compress model.gguf -o small.gguf --bits 8 --where "*attn*" --where "*ffn*"
  jaxweights compress model.safetensors -o small.safetensors --prune 0.5 --cluster 64 --entropy-coding
  jaxweights compress model/ -o model-nf4/ --format nf4

a recipe in TOML does different things to different weights; the first rule that matches a name holds:
  [[rules]]
  weights = "*embeddings*"       # a glob or a list of globs; * matches any characters
  bits = 8                       # 2 to 8; or format = "nf4", or cluster = 64, or keep = true

  [[rules]]
  weights = "*"
  prune = "2:4"                  # or a fraction of zeros, such as 0.5
  bits = 4
  block = 128                    # inputs that share a scale; without it all of an output unit
  symmetric = false              # zero points
  scale = "bfloat16"             # dtype of the scales; without it that of the weight
  input = -1                     # the axis that is summed over, where the name does not tell

  [output]
  to = "compressed-tensors"      # or bitsandbytes, mxfp4, gguf, dense, jaxweights
  entropy_coding = true          # to = "jaxweights": as few bits as the codes have information

The recipe is saved in OUT: --recipe OUT.safetensors does the same to another model. In Python it is
jaxweights.recipes.Recipe."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "compress",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the model")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="the file or folder to write")
    parser.add_argument("--recipe", metavar="TOML", help="a recipe, or a file that was made with one")
    parser.add_argument("--where", metavar="GLOB", action="append", help="names of the weights to take; by default all")
    parser.add_argument("--prune", metavar="SPARSITY", help="the fraction of zeros, or n:m")
    parser.add_argument("--bits", metavar="B", type=int, help="round to integers of 2 to 8 bits")
    parser.add_argument(
        "--format", metavar="NAME", type=str.lower, help='round to "nf4", "mxfp4", "fp8_e4m3", "nvfp4", ...'
    )
    parser.add_argument("--cluster", metavar="K", type=int, help="let a weight have at most K values, up to 256")
    parser.add_argument("--block", metavar="N", type=int, help="number of inputs that share a scale")
    parser.add_argument("--to", metavar="LAYOUT", type=str.lower, help="the layout of OUT: see above")
    parser.add_argument(
        "--entropy-coding", action="store_true", help="as few bits as codes have information; our own layout"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from jaxweights.command.job import compress  # imports JAX

    compress(Path(options.file), Path(options.out), recipe_of(options), force=options.force)
    return 0


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the options give or name."""
    from jaxweights.command.assemble import RECIPE
    from jaxweights.files import metadata
    from jaxweights.models.recipe import Recipe, Rule, pattern

    keys = ("where", "prune", "bits", "format", "cluster", "block")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    if options.recipe is None:
        if not given:
            raise ValueError("nothing is to be done: give --recipe, --prune, --bits, --format or --cluster")
        where = tuple(given.pop("where", ["*"]))
        if "prune" in given:
            given["prune"] = pattern(given["prune"], "--prune")
        rule = Rule(where[0] if len(where) == 1 else where, **given)
        return Recipe((rule,), options.to, options.entropy_coding)
    if given:
        raise ValueError(f"--recipe has the rules, so --{next(iter(given))} has no place: write it into the recipe")
    path = Path(options.recipe)
    if path.suffix in (".safetensors", ".gguf") or path.is_dir():
        saved = metadata(path).get(RECIPE)
        if saved is None:
            raise ValueError(f"{path.name} has no recipe: it was not made by jaxweights compress")
        try:
            recipe = Recipe.parse(str(saved))
        except ValueError as e:
            raise ValueError(f"the recipe in {path.name}: {e}") from e
    else:
        recipe = Recipe.load(path)
    coding = options.entropy_coding or recipe.entropy_coding
    return dataclasses.replace(recipe, to=options.to or recipe.to, entropy_coding=coding)
