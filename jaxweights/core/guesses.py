"""Says so, once a path, where the result depends on axes that names and shapes do not decide."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping

from jaxweights.core.axes import Reading, in_words
from jaxweights.core.biases import Shape
from jaxweights.core.inference import infer
from jaxweights.core.transform import Transform


class AxesWarning(UserWarning):
    """A weight can be read in two ways, and what is done with it depends on which is right."""


def warn_of_guesses(transforms: Mapping[str, Transform], shapes: Mapping[str, Shape]) -> None:
    """Warns of each weight whose axes are a guess that its transform depends on.

    Args:
      transforms: {path: transform}, before the axes of the weights are filled in.
      shapes: {path: shape} of all weights of the tree.
    """
    warn({path: t.tells_apart for path, t in transforms.items()}, shapes)


def warn(tells_apart: Mapping[str, Callable[[Reading, Reading], bool]], shapes: Mapping[str, Shape]) -> None:
    """Warns of guesses between readings that are told apart, once a path. Weights of one reading share a warning."""
    found = infer(shapes)
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, tell in tells_apart.items():
        axes, _, others = found[path]
        shape = shapes[path]
        taken, *rest = (Reading.of(one, shape).squeezed(shape) for one in (axes, *others))
        if any(tell(taken, other) for other in rest):
            readings = tuple(dict.fromkeys(in_words(one, shape) for one in (axes, *others)))
            if (path, shape, readings) not in _told:
                alike[readings].append(path)
    for readings, paths in alike.items():
        named = ", ".join(f"{path!r} {shapes[path]}" for path in paths[:8])
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        taken, *rest = map(repr, readings)
        warnings.warn(
            f"the axes of {named}{more} are a guess: {taken} is taken, and {' or '.join(rest)} fits too. Read them off "
            f"the program with layout=jaxweights.layout(f, params, *args), or say which with axes=jaxweights.Axes(...)",
            AxesWarning,
            stacklevel=3,
        )
        _told.update((path, shapes[path], readings) for path in paths)


_told: set[tuple[str, Shape, tuple[str, ...]]] = set()
"""The guesses that were warned of. `warnings` remembers by line of code, and forgets whenever its filters change."""
