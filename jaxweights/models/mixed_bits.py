"""Mixed precision: a format for each weight under a budget of bytes, by how much it changes what the model computes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.calibration import InputStats
from jaxweights.core.checks import check_integer, check_scalar
from jaxweights.core.method import Method, methods_of
from jaxweights.core.stored import nbytes as bytes_of
from jaxweights.levels.paths import Where, flatten
from jaxweights.models.capture import as_arguments, capture, check_batches
from jaxweights.models.layout import layout
from jaxweights.models.one_shot.one_shot import Methods, chosen_methods, fit_each
from jaxweights.models.progress import shown
from jaxweights.models.stored import densify
from jaxweights.models.summary_table import printed, shortened
from jaxweights.numerics.budget import least_error
from jaxweights.programs.trace import split_arrays
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.one_shot.round_to_nearest import RoundToNearest

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table


class Option(NamedTuple):
    """A method for a weight.

    Attributes:
      method: the method, or several in order.
      nbytes: bytes of the weight with it.
      error: change of the model's output if nothing but this weight is replaced.
    """

    method: Methods
    nbytes: int
    error: float


class Choice(NamedTuple):
    """The method that is chosen for a weight.

    Attributes:
      path: of the weight.
      size: number of its entries.
      options: what there was to choose from, in the order of the candidates.
      chosen: which of them it is.
    """

    path: str
    size: int
    options: tuple[Option, ...]
    chosen: int

    @property
    def option(self) -> Option:
        """The one that is chosen."""
        return self.options[self.chosen]


@dataclasses.dataclass(frozen=True)
class MixedBits:
    """The choices of `mixed_bits`. `print` and rich show them as a table.

    Attributes:
      choices: one for each weight.
      labels: what the table calls the candidates.
    """

    choices: tuple[Choice, ...]
    labels: tuple[str, ...]

    @property
    def rules(self) -> dict[str, Methods]:
        """{path: method}, for `compress` and `one_shot`."""
        return {choice.path: choice.option.method for choice in self.choices}

    @property
    def nbytes(self) -> int:
        """Bytes of all these weights."""
        return sum(choice.option.nbytes for choice in self.choices)

    @property
    def error(self) -> float:
        """Sum of the errors: an estimate of that of the whole model."""
        return sum(choice.option.error for choice in self.choices)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield _table(self, options.max_width)

    def __str__(self) -> str:
        """The table in the width of the terminal, or in 80 columns without one."""
        return printed(self)


def mixed_bits(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    candidates: Sequence[int | str | Format | Methods],
    *,
    nbytes: int | None = None,
    bits: float | None = None,
    distance: Callable[[Any, Any], Any] | None = None,
    where: Where | None = None,
    progress: bool = False,
) -> MixedBits:
    """Chooses a format or method for each weight, so that the model changes least within a budget of bytes.

    minimize Σ_l error_l(m_l) subject to Σ_l bytes_l(m_l) <= budget. error_l(m) is measured: the distance between what
    the model computes on the batches with weight l alone replaced by method m, and what it computes without. The choice
    is optimal, by dynamic programming, with bytes rounded up to 1/20,000 of the room in the budget.

    It runs the model once for every weight, candidate and batch, with one compiled program: a few hundred inputs are
    enough. That errors add up is an assumption, which holds where they are small.

    Args:
      f: a function (params, *batch), as in evaluation.
      params: the tree of weights.
      batches: an iterable of batches: a tuple of the arguments after `params`, or the one argument. All are kept.
      candidates: numbers of bits, names of formats, formats or methods of `jaxweights.methods`. A format stands for
        `RoundToNearest`.
      nbytes: the budget: bytes of all weights that are chosen for, with scales. Biases and the like are not counted.
      bits: the budget as a mean number of bits an entry, in place of `nbytes`.
      distance: a function of what `f` returns, as it was and as it is with a weight replaced, to a number: for
        instance the divergence of predictions. By default ‖y − y'‖²/‖y‖².
      where: the weights to choose for, as in `on_tree`. By default those of two or more axes that meet data in a
        product.
      progress: whether to show a bar.

    Returns:
      `MixedBits`: `print` it, and pass its `rules` to `compress`, or to `one_shot` with the same `layout`.

    Raises:
      TypeError: `f` is not callable, `batches` not iterable, or a candidate not a format or method.
      ValueError: there are no batches or candidates, `nbytes` and `bits` are both given or both left out, or even the
        smallest candidates are beyond the budget.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"first": jnp.linspace(-3, 3, 64).reshape(8, 8), "second": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    >>> f = lambda params, x: x @ params["first"] + 0.001 * x @ params["second"]
    >>> found = mixed_bits(f, params, [jnp.eye(8)], [2, 4, 8], bits=10)
    >>> print({path: method.format for path, method in found.rules.items()}, found.nbytes)
    {'first': 8, 'second': 4} 160

    References: Dong, Yao, Arfeen, Gholami, Mahoney and Keutzer, HAWQ-V2, arXiv:1911.03852, 2019; Nagel et al., A White
    Paper on Neural Network Quantization, arXiv:2106.08295, 2021 (sensitivity by layer).
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *batch), got {type(f).__name__}: wrap the model in one")
    methods, labels = _methods(candidates)
    _check_budget(nbytes, bits)
    if distance is not None and not callable(distance):
        raise TypeError(f"distance must be a function (outputs, new outputs), got {type(distance).__name__}")
    check_batches(batches)
    given = [as_arguments(batch) for batch in batches]
    if not given:
        raise ValueError("batches is empty: give at least one batch")

    axes, tree = layout(f, params, *given[0]), flatten(params)
    by_path = tree.by_path
    matrices = [path for path in axes if len(by_path[path].shape) >= 2]
    paths = list(chosen_methods(tree, RoundToNearest(8), where, matrices))
    needs = frozenset[str]().union(*(m.needs for several in methods for m in methods_of(several)))
    stats: dict[str, InputStats] = {}
    if needs:
        stats = capture(f, params, given, paths, second_moment="second_moment" in needs)

    arrays, rebuild = split_arrays(densify(params))

    @jax.jit
    def run(arrays: list[Any], batch: tuple[Any, ...]) -> Any:
        return f(rebuild(arrays), *batch)

    @jax.jit
    def error(arrays: list[Any], new: dict[str, Any], old: Any, batch: tuple[Any, ...]) -> Any:
        return (distance or relative_error)(old, f(flatten(rebuild(arrays)).replaced(new), *batch))

    outputs = [run(arrays, batch) for batch in given]
    options: dict[str, list[Option]] = {path: [] for path in paths}
    whole = {path: jnp.asarray(by_path[path]) for path in paths}
    for path, method in shown(list(itertools.product(paths, methods)), "mixed_bits", progress):
        new = fit_each(by_path, {path: methods_of(method)}, stats, axes, progress=False)[path]
        replaced = whole | {path: densify(new)}
        errors = [error(arrays, replaced, old, batch) for old, batch in zip(outputs, given, strict=True)]
        options[path].append(Option(method, bytes_of(new), float(np.mean(errors))))

    size = {path: math.prod(by_path[path].shape) for path in paths}
    budget = nbytes if nbytes is not None else math.floor((bits or 0) * sum(size.values()) / 8)
    costs = [[option.nbytes for option in options[path]] for path in paths]
    least = sum(map(min, costs))
    if least > budget:
        raise ValueError(f"the smallest candidates take {least} bytes, the budget is {budget}: raise it, or add one")
    chosen = least_error(costs, [[option.error for option in options[path]] for path in paths], budget)
    choices = (Choice(p, size[p], tuple(options[p]), i) for p, i in zip(paths, chosen, strict=True))
    return MixedBits(tuple(choices), labels)


def relative_error(old: Any, new: Any) -> jax.Array:
    """‖y − y'‖²/‖y‖² over all floating-point arrays of two pytrees; 0 where both are 0."""
    error, norm = jnp.zeros(()), jnp.zeros(())
    for y, changed in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.issubdtype(jnp.result_type(y), jnp.floating):
            y, changed = jnp.asarray(y, jnp.float32), jnp.asarray(changed, jnp.float32)
            error, norm = error + jnp.sum(jnp.square(y - changed)), norm + jnp.sum(jnp.square(y))
    return jnp.where(error > 0, error / norm, 0)


def _methods(candidates: Any) -> tuple[list[Methods], tuple[str, ...]]:
    """The candidates as methods, and what they are called."""
    if isinstance(candidates, str | Mapping | Method) or not isinstance(candidates, Iterable):
        raise TypeError(f"candidates must be a list of formats or methods, got {candidates!r}: write [3, 4, 8]")
    candidates = list(candidates)
    if not candidates:
        raise ValueError("candidates is empty: give formats or methods to choose from, as in [3, 4, 8]")
    methods: list[Methods] = []
    labels = []
    for candidate in candidates:
        if isinstance(candidate, Method | list | tuple):
            several = methods_of(candidate)
            methods.append(candidate)
            labels.append(" ".join(type(m).__name__ for m in several))
        else:
            methods.append(RoundToNearest(candidate))
            labels.append(f"int{candidate}" if isinstance(candidate, int) else str(candidate)[:24])
    return methods, tuple(labels)


def _check_budget(nbytes: Any, bits: Any) -> None:
    if (nbytes is None) == (bits is None):
        raise ValueError("give the budget once: nbytes, for all weights, or bits, the mean of an entry")
    if nbytes is not None:
        check_integer("nbytes", nbytes, 1)
    if bits is not None:
        check_scalar("bits", bits, 0)


def _table(found: MixedBits, width: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=True, padding=(0, 1, 0, 0))
    size = sum(choice.size for choice in found.choices)
    footers = {
        "weight": f"{size:,} entries",
        "form": "",
        "bits": f"{8 * found.nbytes / max(size, 1):.2f}",
        "kB": f"{found.nbytes / 1000:,.1f}",
        "error": f"{found.error:.1e}",
    }
    for heading, footer in footers.items():
        justify: Any = "left" if heading in ("weight", "form") else "right"
        table.add_column(heading, footer, justify=justify, no_wrap=True)
    paths = shortened([choice.path for choice in found.choices], max(width - 40, 16))
    for path, choice in zip(paths, found.choices, strict=True):
        option = choice.option
        bits = f"{8 * option.nbytes / max(choice.size, 1):.2f}"
        table.add_row(path, found.labels[choice.chosen], bits, f"{option.nbytes / 1000:,.1f}", f"{option.error:.1e}")
    return table
