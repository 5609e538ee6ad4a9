"""Tensors of a file whose symbols are entropy-coded: which those are, and how they are told of in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.files import entropy
from jaxweights.files.bits import from_words, to_words
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.weight_sharing.clustered import ClusteredArray

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LEAST_ZEROS = 1 / 32  # of an array of floats, for its zeros to be worth a code


class Coded(NamedTuple):
    """A tensor as a row of bytes, and what has to be known to read it."""

    code: np.ndarray
    description: dict[str, Any]


def coded(part: str, tensor: jax.Array | np.ndarray, stored: Any = None) -> Coded | None:
    """The code of a tensor, or None if there is none that is shorter.

    Coded are the words of a `QuantizedArray` and a `ClusteredArray` (as their codes, which a description
    {"bits": b} tells of), booleans and bytes ({"dtype": "bool"} or {"dtype": "uint8"}), and the zeros of floats
    ({"dtype": "float32", "others": n}: which of them are others than 0, then these n as they are).

    Args:
      part: the name of the tensor in the stored weight.
      tensor: the tensor.
      stored: the stored weight, if it is of one.
    """
    values = np.asarray(tensor)
    found = None
    if values.ndim == 0 or not values.size:
        return None
    if part == "words" and isinstance(stored, QuantizedArray | ClusteredArray):
        bits = stored.bits if isinstance(stored, ClusteredArray) else stored.format.grid.bits
        codes = from_words(values, bits, stored.rows)
        if np.array_equal(to_words(codes, bits), values):
            found = Coded(_bytes(entropy.encode(codes, 2**bits)), {"bits": bits})
    elif values.dtype in (np.bool_, np.uint8):
        symbols = values.view(np.uint8)
        found = Coded(_bytes(entropy.encode(symbols, int(symbols.max()) + 1)), {"dtype": str(values.dtype)})
    elif str(values.dtype) in _FLOATS:
        is_other = _as_integers(values) != 0  # −0 is another number than 0
        others = values[is_other]
        if others.size <= (1 - _LEAST_ZEROS) * values.size:
            code = entropy.encode(is_other.view(np.uint8), 2) + others.tobytes()
            found = Coded(_bytes(code), {"dtype": str(values.dtype), "others": others.size})
    return found if found is not None and found.code.nbytes < values.nbytes else None


def decoded(what: str, description: Any, code: np.ndarray) -> np.ndarray:
    """The tensor of a code. Raises a ValueError, which starts with `what`, if it is none."""
    try:
        if code.dtype != np.uint8 or code.ndim != 1:
            raise ValueError(f"it is of dtype {code.dtype} and shape {code.shape}, not a row of bytes")
        return _decoded(description, code)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{what} is no entropy code as its description says: {e}") from e


def _decoded(description: Any, code: np.ndarray) -> np.ndarray:
    if not isinstance(description, Mapping):
        raise ValueError(f"the description is {str(description)[:200]!r}")
    if set(description) == {"bits"}:
        bits = _integer(description["bits"], 1, 8)
        codes = entropy.decode(code)
        if codes.ndim < 2 or codes.max(initial=0) >= 2**bits:
            raise ValueError(f"codes of shape {codes.shape} up to {codes.max(initial=0)} are none of {bits} bits")
        return to_words(codes, bits)
    name = description["dtype"]
    if set(description) == {"dtype"} and name in ("bool", "uint8"):
        symbols = entropy.decode(code)
        if name == "bool" and symbols.max(initial=0) > 1:
            raise ValueError("booleans are 0 or 1")
        return symbols.view(name)
    if set(description) == {"dtype", "others"} and name in _FLOATS:
        dtype = jnp.dtype(name)
        n = _integer(description["others"], 0, len(code) // dtype.itemsize)
        start = len(code) - n * dtype.itemsize
        is_other = entropy.decode(code[:start])
        if is_other.max(initial=0) > 1 or np.count_nonzero(is_other) != n:
            raise ValueError(f"it has {np.count_nonzero(is_other)} numbers other than 0, not {n}")
        values = np.zeros(is_other.shape, dtype)
        values[is_other.view(bool)] = np.frombuffer(code[start:].tobytes(), dtype)
        return values
    raise ValueError(f"the description is {str(description)[:200]!r}")


def _as_integers(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _bytes(code: bytes) -> np.ndarray:
    return np.frombuffer(code, np.uint8)


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{str(value)[:200]!r} is no integer from {low} to {high}")
    return value
