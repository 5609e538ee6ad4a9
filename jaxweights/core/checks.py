"""Checks of bad input: the argument, what was got, and what to do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_weight(w, name: str = "w") -> jax.Array:
    """`w` as a JAX array, or an error unless it is an array of a real floating dtype."""
    if not isinstance(w, jax.Array | np.ndarray | np.generic | float) or isinstance(w, bool):
        remedy = "for a tree use jax.tree.map, on_tree or one_shot; else convert it with jnp.asarray"
        if hasattr(w, name):
            remedy = f"give its .{name}"
        elif hasattr(type(w), "todense"):
            remedy = "make it an array with .todense()"
        raise TypeError(f"{name} must be a floating-point array, got {type(w).__name__}: {remedy}")
    dtype = jnp.result_type(w)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {dtype}: transform .real and .imag on their own")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be of a floating dtype, got {dtype}: convert it with .astype(jnp.float32)")
    return jnp.asarray(w)


def check_scalar(name: str, value, low: float = -math.inf, high: float = math.inf, *, schedule: bool = False):
    """Raises unless `value` is a real number in [low, high]. The value of a JAX array is not checked.

    With `schedule=True` a callable is accepted, and not checked either.
    """
    kind = "a number or a schedule" if schedule else "a number"
    if callable(value):
        if not schedule:
            raise TypeError(f"{name} must be a number here, got the callable {value!r}: evaluate it at the step first")
        return
    if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, np.generic):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}: pass one number")
        if not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(f"{name} must be {kind}, got an array of dtype {value.dtype}: pass a real number")
        if isinstance(value, jax.Array):
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__} {value!r}: pass a real number")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got NaN: look where it was computed")
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


def check_order(low_name: str, low, high_name: str, high) -> None:
    """Raises if `low` > `high` anywhere. Schedules and JAX arrays are not checked: their values are not known here."""
    unknown = any(callable(value) or isinstance(value, jax.Array) for value in (low, high))
    if not unknown and np.any(low > high):
        got = "arrays that cross" if np.ndim(low) or np.ndim(high) else f"{low!r} and {high!r}"
        raise ValueError(f"{low_name} must be at most {high_name}, got {got}: swap them")


def check_broadcast(name: str, got: tuple[int, ...], shape: tuple[int, ...], of: str = "w") -> None:
    """Raises unless an array of shape `got` broadcasts to `shape`, without making it larger."""
    if len(got) > len(shape) or any(g not in (1, s) for g, s in zip(reversed(got), reversed(shape), strict=False)):
        raise ValueError(f"{name} must broadcast to {of} {shape}, got shape {got}: add axes with [..., None]")


def check_integer(name: str, value, low: int, high: int | None = None, remedy: str = "") -> None:
    """Raises unless `value` is a Python integer in [low, high]; outside it, with the remedy."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}: pass a Python int")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}{remedy and ': '}{remedy}")


def check_shape(name: str, shape) -> tuple[int, ...]:
    """`shape` as a tuple, or an error unless it is a sequence of integers of at least 0."""
    if isinstance(shape, str | int | float) or not isinstance(shape, Sequence):
        got = repr(shape) if isinstance(shape, str | int | float) else type(shape).__name__
        raise TypeError(f"{name} must be a sequence of integers, got {got}: write (2, 3), or (2,) for one axis")
    for size in shape:
        check_integer(f"each size in {name}", size, 0)
    return tuple(shape)


def check_dtype(dtype, name: str = "dtype") -> jnp.dtype:
    """`dtype` as a dtype, or an error unless it is a real floating one."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating dtype, got {dtype}: use jnp.float32")
    return jnp.dtype(dtype)


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of the strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_key(key) -> None:
    """Raises unless `key` is one key, of the typed or of the old kind."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if typed else 1) and (typed or key.dtype == jnp.uint32):
            return
        raise TypeError(f"key must be one key, got shape {key.shape} and dtype {key.dtype}: write jax.random.key(0)")
    raise TypeError(f"key must be a key, got {type(key).__name__} {key!r}: write jax.random.key(0)")


def check_mask(where, shape: tuple[int, ...]) -> jax.Array:
    """`where` as a boolean array of as many axes as `shape`, to which it broadcasts, or an error."""
    kind = getattr(where, "dtype", type(where))
    if not jnp.issubdtype(kind, jnp.bool_):
        raise TypeError(f"where must be a boolean array, got {kind}: compare it with a number")
    got = jnp.shape(where)
    check_broadcast("where", got, shape, "x")
    return jnp.expand_dims(where, range(len(shape) - len(got)))


def check_state(state, **entries: tuple[int, ...] | jax.ShapeDtypeStruct | None) -> None:
    """Raises unless `state` is a dict with an array of each name and shape; None is any shape.

    Where an entry is described with a dtype, an array of integers or booleans must still be one.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be the dict that init returned, got {type(state).__name__}: pass init(w, key)")
    remedy = "pass the state that init returned for this weight (in Flax Linen, all its collections)"
    for name, entry in entries.items():
        described = isinstance(entry, jax.ShapeDtypeStruct)
        shape = entry.shape if described else entry
        if name not in state:
            raise ValueError(f"the state has no {name!r}, it has {sorted(state)}: {remedy}")
        if shape is not None and jnp.shape(state[name]) != shape:
            raise ValueError(
                f"the state has {name!r} of shape {jnp.shape(state[name])}, this weight needs {shape}: {remedy}"
            )
        if described:
            check_exact(name, state[name], entry.dtype)


def check_exact(name: str, value, dtype) -> None:
    """Raises if the entry `name` of a state is floating where `init` makes integers, booleans or packed words."""
    if is_floating(value) and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the state has {name!r} of dtype {jnp.result_type(value)}, init makes it {dtype}: it was averaged or "
            f"cast. Average only the floating entries and take the others from the last step, or average only the "
            f"weights; then call update"
        )


def is_floating(value) -> bool:
    """Whether an entry of a state is a floating-point array."""
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


@contextlib.contextmanager
def naming(name: str, path: str):
    """Prefixes errors of bad input with the name of the transform and the path, if there is one."""
    if not path:
        yield
        return
    try:
        yield
    except KeyError as e:
        raise ValueError(
            f"{name} at {path!r}: the state has no {e}. Pass the state that init returned for this tree; "
            f"for a Linen module, all the collections that it returned"
        ) from e
    except (TypeError, ValueError) as e:
        if type(e) not in (TypeError, ValueError):
            raise
        raise type(e)(f"{name} at {path!r}: {e}") from e
