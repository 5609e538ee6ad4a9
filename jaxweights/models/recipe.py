"""Recipes: which weights of a model are pruned, quantized and clustered, and how; in TOML or in Python."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_integer
from jaxweights.core.inference import infer
from jaxweights.core.method import Method
from jaxweights.levels.paths import flatten, is_weight
from jaxweights.techniques.quantization.formats import Format, format_of, integers
from jaxweights.techniques.quantization.one_shot.round_to_nearest import RoundToNearest
from jaxweights.techniques.sparsification.one_shot.magnitude import Magnitude
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity
from jaxweights.techniques.weight_sharing.one_shot import Cluster

SCALES = ("float32", "float16", "bfloat16")
"""Dtypes of scales."""
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is done to the weights whose names match.

    Weights are pruned first, then quantized or clustered. Zeros stay zeros.

    Args:
      weights: a glob, or several, on names such as "layers.0.up.weight". `*` matches any characters; "." and "/" are
        alike, and "**/kernel" is every "kernel".
      keep: whether they stay as they are.
      prune: the fraction of zeros in [0, 1); or (n, m), in TOML "n:m": n of every m inputs stay.
      bits: 2 to 8: round to integers.
      format: another format by its name, such as "nf4" or "mxfp4": see `jaxweights.formats`. "int4" is bits = 4.
      block: number of inputs that share a scale. By default all of an output unit, or what the format has.
      symmetric: False gives integers a zero point for each scale.
      scale: the dtype of the scales of integers. By default that of the weight.
      cluster: the number of values that a weight may have, 0 included: up to 256, with `prune` up to 255.
      input: -1 or -2: the axis that a matrix of these weights sums over; axes before the last two number a stack. By
        default names and shapes tell.

    >>> Rule("*", prune=(2, 4), bits=4, block=32).methods("float32")
    (Magnitude(sparsity=(2, 4)), RoundToNearest(format=Format(grid=Integers(bits=4, low=-7, high=7), block=32, \
scale=ScaleFormat(dtype='float32', outer=None), zero_point=False, per_tensor=False), block=None, range=None))
    """

    weights: str | tuple[str, ...]
    _: dataclasses.KW_ONLY
    keep: bool = False
    prune: Sparsity | None = None
    bits: int | None = None
    format: str | None = None
    block: int | None = None
    symmetric: bool = True
    scale: str | None = None
    cluster: int | None = None
    input: int | None = None

    def __post_init__(self):
        if self.bits is None and self.format in _INTEGERS:
            object.__setattr__(self, "bits", int(self.format[-1]))
            object.__setattr__(self, "format", None)
        is_named = isinstance(self.weights, str | tuple | list) and len(self.globs) > 0
        if not is_named or not all(isinstance(glob, str) and glob for glob in self.globs):
            raise TypeError(f"weights must be a glob or a tuple of globs, got {self.weights!r}: write '*'")
        for name in ("keep", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.prune is not None:
            self._check_prune(self.prune)
        if self.bits is not None:
            check_integer("bits", self.bits, 2, 8)
        if self.block is not None:
            check_integer("block", self.block, 1)
        if self.cluster is not None:
            check_integer("cluster", self.cluster, 1, 256 - (self.prune is not None))
        if self.input not in (None, -1, -2) or isinstance(self.input, bool | float):
            raise ValueError(f"input must be -1 or -2, one of the last two axes, got {self.input!r}")
        if self.scale is not None and self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        self._check_together()

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs, one or several."""
        return (self.weights,) if isinstance(self.weights, str) else tuple(self.weights)

    def methods(self, dtype: Any) -> tuple[Method, ...]:
        """The methods of `one_shot` for a weight of this dtype; none of a rule to keep it."""
        made: list[Method] = []
        if self.prune is not None:
            made.append(Magnitude(self.prune))
        if self.bits is not None:
            stored = self.scale or (str(dtype) if str(dtype) in SCALES else "float32")
            format = integers(self.bits, block=self.block, symmetric=self.symmetric, scale=stored)
            made.append(RoundToNearest(format))
        elif self.format is not None:
            made.append(RoundToNearest(self._format()))
        elif self.cluster is not None:
            made.append(Cluster(self.cluster, keep_zeros=self.prune is not None))
        return tuple(made)

    def axes(self, ndim: int) -> Axes | None:
        """How a weight of so many axes is read, if the rule says so."""
        if self.input is None or ndim < 2:
            return None
        return Axes(input=self.input, output=-3 - self.input, batch=tuple(range(ndim - 2)))

    def fields(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as a recipe in TOML has them."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {f.name: given[f.name] for f in dataclasses.fields(self) if given[f.name] != f.default}
        given["weights"] = self.weights if isinstance(self.weights, str) else list(self.weights)
        if isinstance(self.prune, tuple):
            given["prune"] = f"{self.prune[0]}:{self.prune[1]}"
        return given

    def _format(self) -> Format:
        assert self.format is not None
        return format_of(self.format, self.block)

    @staticmethod
    def _check_prune(prune: Any) -> None:
        if isinstance(prune, bool) or not isinstance(prune, int | float | tuple):
            raise TypeError(f"prune must be a fraction in [0, 1) or 'n:m', got {prune!r}: write 0.5 or '2:4'")
        if not isinstance(prune, tuple) and not 0 <= prune < 1:
            half = "0.5 sets half of the weights to 0"
            percent = f"write {prune / 100:g} for {prune:g}%" if 1 < prune < 100 else half
            raise ValueError(f"prune must be in [0, 1), got {prune!r}: {percent}")
        try:
            check_sparsity(prune, 0)
        except (TypeError, ValueError) as e:
            raise type(e)(f"prune: {e}") from e

    def _check_together(self) -> None:
        """Raises if two keys contradict each other, or one has no effect."""
        ways = [name for name in ("bits", "format", "cluster") if getattr(self, name) is not None]
        if self.keep and (ways or self.prune is not None):
            raise ValueError(f"keep leaves weights as they are, {(*ways, 'prune')[0]} does not: give one of them")
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} are two ways to store a weight: give one of them")
        if not (self.keep or ways or self.prune is not None):
            raise ValueError("nothing is to be done: give prune, bits, format, cluster or keep")
        if self.block is not None and not (self.bits or self.format):
            raise ValueError("block is of bits or format: give one of them, or leave it out")
        for name, given in (("symmetric", not self.symmetric), ("scale", self.scale is not None)):
            if given and not self.bits:
                raise ValueError(f"{name} is of bits: give them, or leave it out")
        if self.format is not None and not self._format().has_zero and self.prune is not None:
            raise ValueError(f"{self.format!r} has no 0, so what prune sets to 0 would not stay so: give one of them")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is compressed: rules, of which the first that matches a weight holds.

    Args:
      rules: the rules, in order. Weights that none matches stay as they are.
      to: the layout of the file that `jaxweights compress` writes: see `jaxweights compress --help`. By default it
        follows from the rules. A tree in memory has none.
      entropy_coding: whether the file is entropy-coded, in our own layout: as in `jaxweights.files.save`.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> recipe = Recipe.parse('''
    ... [[rules]]
    ... weights = "*embedding"
    ... bits = 8
    ...
    ... [[rules]]
    ... weights = "*"
    ... prune = 0.5
    ... bits = 4
    ... ''')
    >>> params = {"words": {"embedding": jnp.ones((8, 4))}, "dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    >>> small = jw.one_shot(params, recipe.methods(params))
    >>> print(small["words"]["embedding"].format, small["dense"]["kernel"].format, small["dense"]["bias"])
    int8 int4 [1. 1.]
    """

    rules: tuple[Rule, ...]
    to: str | None = None
    entropy_coding: bool = False

    def __post_init__(self):
        if not isinstance(self.entropy_coding, bool):
            raise TypeError(f"entropy_coding must be true or false, got {self.entropy_coding!r}")
        if not isinstance(self.rules, tuple) or not self.rules or not all(isinstance(r, Rule) for r in self.rules):
            raise TypeError(
                f"rules must be a tuple of Rule, one at least, got {self.rules!r}: write (Rule('*', bits=4),)"
            )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of a text in TOML. Raises a ValueError that names the rule and the key."""
        try:
            return _recipe(text)
        except RecursionError as e:
            raise ValueError("the recipe is nested too deeply") from e

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a file. Errors name the file."""
        try:
            return cls.parse(Path(path).read_text("utf-8"))
        except ValueError as e:
            raise ValueError(f"{Path(path).name}: {e}") from e

    def toml(self) -> str:
        """The recipe in TOML: `parse` of it is the same recipe."""
        tables = [("[[rules]]", rule.fields()) for rule in self.rules]
        output: dict[str, Any] = {} if self.to is None else {"to": self.to}
        if self.entropy_coding:
            output["entropy_coding"] = True
        if output:
            tables.append(("[output]", output))
        lines = [[head, *(f"{key} = {_toml(value)}" for key, value in given.items())] for head, given in tables]
        return "\n\n".join("\n".join(of) for of in lines) + "\n"

    def chosen(self, names: Mapping[str, Any] | list[str]) -> dict[str, Rule]:
        """The rule of each name that one matches. Raises a ValueError if a glob matches no name."""
        found: dict[str, Rule] = {}
        for i, rule in enumerate(self.rules):
            for glob in rule.globs:
                matched = [name for name in names if matches(glob, name)]
                if not matched:
                    listed = ", ".join(list(names)[:20]) + (", ..." if len(names) > 20 else "")
                    raise ValueError(f"rule {i + 1}: weights = {glob!r} matches nothing. The names are: {listed}")
                for name in matched:
                    found.setdefault(name, rule)
        return found

    def methods(self, params: Any) -> dict[str, tuple[Method, ...]]:
        """{path: methods} of a tree, for `one_shot` and `compress`. Vectors and what is no kernel stay as they are.

        Args:
          params: the tree of weights.

        Raises:
          ValueError: a glob matches nothing.
        """
        weights = {path: w for path, w in flatten(params).by_path.items() if is_weight(w)}
        rules = self.chosen(weights)
        kernels = infer({path: tuple(w.shape) for path, w in weights.items()})
        methods = {}
        for path, rule in rules.items():
            if rule.input is not None:
                raise ValueError(
                    f"{path!r}: input is for files. For a tree give one_shot a layout, as in "
                    f"layout={{{path!r}: jaxweights.Axes(input=-1, output=-2)}}"
                )
            if kernels[path].axes is not None and not rule.keep:
                methods[path] = rule.methods(weights[path].dtype)
        return methods


def matches(glob: str, name: str) -> bool:
    """Whether a glob matches the name of a weight. "." and "/" are alike.

    >>> matches("*.weight", "layers.0.up.weight"), matches("**/kernel", "kernel"), matches("up.*", "layers.up.kernel")
    (True, True, False)
    """
    return _regex(glob).fullmatch(name.replace("/", ".")) is not None


@functools.lru_cache(maxsize=1024)
def _regex(glob: str) -> re.Pattern[str]:
    out = ""
    for token in re.findall(r"\*\*\.|\*+|\?|\[!?[^\]]+\]|.", glob.replace("/", "."), re.DOTALL):
        if token == "**.":
            out += r"(?:.*\.)?"
        elif token[0] == "*":
            out += ".*"
        elif token == "?":
            out += "."
        elif len(token) > 1:
            out += token.replace("[!", "[^").replace("\\", "\\\\")
        else:
            out += re.escape(token)
    try:
        return re.compile(out, re.DOTALL)
    except re.error as e:
        raise ValueError(f"{glob!r} is no glob: {e}") from e


def _recipe(text: str) -> Recipe:
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"the recipe is no TOML: {e}") from e
    _check_keys("the recipe", parsed, ("rules", "output"))
    tables, output = parsed.get("rules", []), parsed.get("output", {})
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ValueError('the recipe has no rules: write [[rules]] and under it weights = "*" and bits = 4')
    if not isinstance(output, dict):
        raise ValueError(f"[output] must be a table, got {output!r}")
    _check_keys("[output]", output, ("to", "entropy_coding"))
    if not isinstance(output.get("to", ""), str):
        raise ValueError(f"to in [output] must be a string, got {output['to']!r}")
    rules = tuple(_rule(i + 1, table) for i, table in enumerate(tables))
    try:
        return Recipe(rules, **output)
    except TypeError as e:
        raise ValueError(f"[output]: {e}") from e


def _rule(number: int, table: Mapping[str, Any]) -> Rule:
    where = f"rule {number}" + (f" (weights = {table['weights']!r})" if "weights" in table else "")
    names = [f.name for f in dataclasses.fields(Rule)]
    _check_keys(where, table, names)
    given = dict(table)
    if "weights" not in given:
        raise ValueError(f'{where} has no weights: write weights = "*" for all')
    if isinstance(given["weights"], list):
        given["weights"] = tuple(given["weights"])
    if isinstance(given.get("prune"), str):
        given["prune"] = pattern(given["prune"], where)
    try:
        return Rule(given.pop("weights"), **given)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from e


def pattern(text: str, what: str) -> float | tuple[int, int]:
    """The sparsity that a text means: "0.5" or "2:4"."""
    if found := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        return int(found[1]), int(found[2])
    try:
        return float(text)
    except ValueError as e:
        raise ValueError(f"{what}: prune must be a fraction such as 0.5, or n:m such as 2:4, got {text!r}") from e


def _check_keys(what: str, table: Mapping[str, Any], known: Any) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{what} has the unknown key {key!r}: known are {', '.join(known)}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
