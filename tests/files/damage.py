"""Damages files: bytes anywhere, and the values in their headers."""

import json
import struct

import numpy as np

NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1, 10**30)
VALUES = (
    *NUMBERS,
    0.5,
    -1e308,
    None,
    True,
    False,
    "",
    "x",
    "F32",
    "I32",
    "F8_E5M2",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
)


def damaged(data, rng):
    """`data` with something wrong, in one of several ways."""
    how = rng.integers(6)
    if how == 0:
        return data[: rng.integers(len(data) + 1)]
    if how == 1:
        return data + bytes(rng.integers(1, 40))
    if how == 2 and data[:4] != b"GGUF":
        return with_header(data, lambda header: _replace(header, rng))
    out = bytearray(data)
    if how == 3:  # bytes where the header is, most of the time
        end = len(data) if rng.random() < 0.3 else min(len(data), 800)
        for _ in range(rng.integers(1, 4)):
            out[rng.integers(end)] = rng.integers(256)
    elif how == 4:  # a number
        at = rng.integers(max(len(data) - 8, 1))
        out[at : at + 8] = struct.pack("<Q", NUMBERS[rng.integers(len(NUMBERS) - 1)] % 2**64)
    else:  # a piece moved
        a, b, n = rng.integers(len(data), size=3)
        n = min(n, 64)
        out[a : a + n] = data[b : b + n]
    return bytes(out)


def with_header(data, change):
    """A safetensors file with another header: `change` makes it from the parsed one."""
    size = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _replace(node, rng):
    """A JSON value with one of its parts, at any depth, replaced, renamed or left out. Looks into JSON in strings."""
    if isinstance(node, str) and node.startswith("{"):
        return json.dumps(_replace(json.loads(node), rng))
    if not isinstance(node, dict | list) or not node or rng.random() < 0.1:
        return VALUES[rng.integers(len(VALUES))]
    if isinstance(node, list):
        i = rng.integers(len(node))
        return [*node[:i], _replace(node[i], rng), *node[i + 1 :]]
    keys = list(node)
    key, how = keys[rng.integers(len(keys))], rng.random()
    rest = {k: v for k, v in node.items() if k != key}
    if how < 0.1:
        return rest
    if how < 0.2:
        return {**rest, keys[rng.integers(len(keys))] + ".x": node[key]}
    return {**node, key: _replace(node[key], rng)}


def generator(seed):
    return np.random.default_rng(seed)
