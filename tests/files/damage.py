"""Damages files: bits and bytes anywhere, the numbers and names of headers, and whole tensors.

A file is cut up once; each damaged copy then takes some microseconds. Damage follows a `random.Random`.
"""

import contextlib
import io
import json
import struct
import zipfile
from typing import NamedTuple

EXTREMES = (0, 1, 2, 3, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**59, 2**60, 2**63, 2**64 - 1)
VALUES = (
    *(n for n in EXTREMES),
    *(-1, -(2**31), 10**30, 0.5, -0.0, 1e308, -1e308, 5e-324, None, True, False),
    *("", "x", "F32", "BF16", "F8_E8M0", "float16", "float8_e8m0fnu", "object", "\ud800", "\0", "a.b", "0"),
    *([], [1], [-1], [[]], [2**60, 0], [None], {}, {"a": 1}),
)
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
WIDTHS |= {"C64": 8, "BOOL": 1, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


class Parts(NamedTuple):
    """A valid file, cut up.

    Attributes:
      data: its bytes.
      header: the JSON of safetensors, or of a text; else None.
      start: where the tensors begin.
      fields: (offset, size) of the numbers in the header of GGUF.
      members: the files in a ZIP archive.
    """

    data: bytes
    header: object
    start: int
    fields: list[tuple[int, int]]
    members: dict[str, bytes]


def parts(data):
    """Cuts up a file."""
    if data[:4] == b"GGUF":
        fields = gguf_fields(data)
        return Parts(data, None, sum(fields[-1]), fields, {})
    if data[:1] == b"{":
        return Parts(data, json.loads(data), 0, [], {})
    size = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and size <= len(data) - 8:
        return Parts(data, json.loads(data[8 : 8 + size]), 8 + size, [], {})
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return Parts(data, None, len(data), [], {name: archive.read(name) for name in archive.namelist()})
    return Parts(data, None, len(data), [], {})


def damaged(p, rng):
    """The file with something wrong, in one way, sometimes in two."""
    ways = [truncated, extended, flipped, overwritten, spliced]
    if p.fields:
        ways += [renumbered] * 5
    elif p.start and p.header is not None:
        ways += [edited] * 5 + [rearranged] * 5
    elif p.header is not None:
        ways += [edited] * 5
    elif p.members:
        ways += [zipped] * 10
    data = rng.choice(ways)(p, rng)
    return rng.choice((flipped, overwritten))(p._replace(data=data), rng) if rng.random() < 0.1 and data else data


def truncated(p, rng):
    return p.data[: rng.randrange(len(p.data))]


def extended(p, rng):
    return p.data + rng.randbytes(rng.randint(1, 40))


def place(p, rng):
    """Where to damage: in the header, most of the time."""
    return rng.randrange(min(p.start, len(p.data)) if p.start and rng.random() < 0.7 else len(p.data))


def flipped(p, rng):
    out = bytearray(p.data)
    for _ in range(rng.randint(1, 4)):
        out[place(p, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwritten(p, rng):
    """One byte, some random ones, or a number."""
    at = place(p, rng)
    new = rng.choice((rng.randbytes(1), rng.randbytes(8), struct.pack("<Q", rng.choice(EXTREMES))))
    return (p.data[:at] + new + p.data[at + len(new) :])[: len(p.data)]


def spliced(p, rng):
    """A piece copied over another, repeated or left out."""
    a, b, n = place(p, rng), place(p, rng), rng.randint(1, 64)
    return p.data[:a] + p.data[b : b + n] + p.data[a + rng.choice((0, n)) :]


def renumbered(p, rng):
    """Other numbers in the header of GGUF: extremes, or a bit more or less."""
    out = bytearray(p.data)
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(p.fields)
        old = int.from_bytes(out[at : at + size], "little")
        new = rng.choice((*EXTREMES, old - 1, old + 1, 2 * old, old // 2, *range(16), 39, *(old + 32, old - 32)))
        out[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(out)


def edited(p, rng):
    """Another header."""
    text = json.dumps(replaced(p.header, rng)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + p.data[p.start :] if p.start else text


def rearranged(p, rng):
    """Tensors left out, renamed, exchanged, of another dtype, shape or content, in a container that is in order."""
    header = dict(p.header)
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: [e["dtype"], e["shape"], p.data[p.start :][slice(*e["data_offsets"])]] for name, e in header.items()
    }
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not tensors:
            break
        name, other = (rng.choice(list(tensors)) for _ in range(2))
        dtype, shape, values = tensors[name]
        how = rng.randrange(7)
        if how == 0:
            del tensors[name]
        elif how == 1:
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif how == 2:
            tensors[rng.choice((other, name + ".x", name[:-1], name.upper()))] = tensors.pop(name)
        elif how == 3:  # as many entries of another dtype
            dtype = rng.choice(list(WIDTHS))
            n = len(values) // WIDTHS[tensors[name][0]]
            values = (values * 8)[: n * WIDTHS[dtype]]
            tensors[name] = [dtype, shape, values if dtype != "BOOL" else bytes(n)]
        elif how == 4:  # as many entries of another shape
            n = len(values) // WIDTHS[dtype]
            shape = rng.choice((shape[::-1], [n], [1, *shape], [*shape, 1], [n, 1], shape[1:] + shape[:1]))
            tensors[name] = [dtype, shape, values]
        elif how == 5 and shape:  # longer, shorter or empty
            at = rng.randrange(len(shape))
            size = rng.choice((0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at], shape[at] // 2))
            shape = [*shape[:at], max(size, 0), *shape[at + 1 :]]
            n = WIDTHS[dtype]
            for length in shape:
                n *= length
            tensors[name] = [dtype, shape, (values or b"\0") * (n // max(len(values), 1) + 1)]
            tensors[name][2] = tensors[name][2][:n]
        elif dtype != "BOOL":  # other values
            tensors[name][2] = rng.choice((bytes(len(values)), b"\xff" * len(values), rng.randbytes(len(values))))
    entries, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (dtype, shape, values) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(values)]}
        end += len(values)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(values for _, _, values in tensors.values())


def zipped(p, rng):
    """A ZIP archive that is in order, of members that are not."""
    members = dict(p.members)
    name = rng.choice(list(members))
    inner = parts(members.pop(name))
    way = rng.choice((truncated, extended, flipped, overwritten, overwritten, retold, retold, retold))
    members[rng.choice((name, name, name, name + ".npy", "x", "../x.npy"))] = way(inner._replace(start=128), rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def retold(p, rng):
    """Another header of an array of NumPy."""
    old, new = rng.choice(
        (
            *((b"<f4", new) for new in (b"|O8", b"<f8", b"<U9", b"<M8", b"|V0", b"<f3", b"S99")),
            *((b"(4, 3)", new) for new in (b"(3, 4)", b"(4, -3)", b"(2**60,)", b"(10000000000, 0)", b"(True, 12)")),
            *((b"False", new) for new in (b"True ", b"1    ", b"None ", b"[]   ")),
            *((b"'descr'", new) for new in (b"'shape'", b"'des', ")),
            *((b"{'", new) for new in (b"({'", b"__import__('os'){'", b"-" * 9 + b"{'", b"[" * 40)),
        )
    )
    return p.data.replace(old, new)


def with_header(data, change):
    """A safetensors file with another header: `change` makes it from the parsed one."""
    p = parts(data)
    text = json.dumps(change(p.header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[p.start :]


def replaced(node, rng):
    """A JSON value with one of its parts, at any depth, replaced, renamed or left out. Looks into JSON in strings."""
    if isinstance(node, str) and node.startswith("{"):
        return json.dumps(replaced(json.loads(node), rng))
    if type(node) is int and rng.random() < 0.5:
        return rng.choice((node - 1, node + 1, -node, 2 * node, node // 2))
    if not isinstance(node, dict | list) or not node or rng.random() < 0.05:
        return rng.choice(VALUES)
    if isinstance(node, list):
        i = rng.randrange(len(node))
        ways = ([*node[:i], replaced(node[i], rng), *node[i + 1 :]],) * 4
        return rng.choice((*ways, node[:i] + node[i + 1 :], [*node, node[i]], node[::-1]))
    keys = list(node)
    key, how = rng.choice(keys), rng.random()
    rest = {k: v for k, v in node.items() if k != key}
    if how < 0.1:
        return rest
    if how < 0.2:
        return {**rest, rng.choice((rng.choice(keys) + ".x", key[:-1], "", ".", "a" * 300)): node[key]}
    if how < 0.25:
        return {**node, key: node[rng.choice(keys)]}
    return {**node, key: replaced(node[key], rng)}


def gguf_fields(data):
    """(offset, size) of the version, the counts, and every length, type, size and offset in a header of GGUF."""
    fields, at = [(4, 4), (8, 8), (16, 8)], 24
    n_tensors, n_values = struct.unpack("<QQ", data[8:24])
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(size):
        nonlocal at
        fields.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def string():
        nonlocal at
        length = number(8)
        at += length

    def value(of):
        if of == 8:
            string()
        elif of == 9:
            below, n = number(4), number(8)
            for _ in range(n):
                value(below)
        else:
            number(sizes[of])

    for _ in range(n_values):
        string()
        value(number(4))
    for _ in range(n_tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields
