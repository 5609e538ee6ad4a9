"""Entropy coding of a matrix of symbols 0 to n − 1, with a static model that is stored before the code.

Weights that were pruned and shared have one common symbol, that of zero, and few others. The common one is told from
the others first, by a density for each row and column, then the others are told apart by their counts:

    P(others at i, j) = T·rᵢ²·cⱼ² / (Σr²·Σc²)

for T others in all and whole numbers r and c, the levels, about the roots of the numbers of others in a row and in a
column. Where a level is 0 there is none, and nothing is coded: dead inputs of a network are free.

The code is a row of bytes. First numbers, in LEB128 (7 bits each, the lowest first, the high bit on all but the last):

    the number of axes, the shape, n, the common symbol;
    1 if rows have levels, else 0, and then one more than the highest (at most 64), and the counts of levels 0, 1, ...;
    the same of columns;
    the counts of the symbols, without the common one.

Axes but the last are rows. Without levels all are 1. Then come words of 32 bits, lowest byte first, of an ANS coder
with a state of 64 bits and frequencies of 24 bits: the last word that is not 0 is the first to be read. The state
starts as the first two words, or one. Symbol s of frequency f, after others of F in sum, is the one for which
F ≤ x mod 2²⁴ < F + f. It takes the state x to f·⌊x/2²⁴⌋ + x mod 2²⁴ − F, and if that is less than 2³², to 2³² times
that plus the next word. In the end it is 0. This is the default coder of the package constriction. Decoded in order are

    the levels of rows, if there are, and those of columns, by their counts;
    for each level of rows, and for each level of columns, lowest first: whether each entry there, row by row, is
    another than the common symbol (2 symbols, the other of frequency 2⁸·p: p = ⌊2¹⁶·P⌋, at least 1, at most 2¹⁶ − 1);
    the others in order, by their counts, numbered without the common one.

Counts mⱼ of k symbols in a run have the frequencies 2 + ⌊mⱼ·(2²⁴ − 2k)/Σm⌋, and the rest of 2²⁴ is of the first with
the highest count. A run of one symbol, or of none, is not coded.

All of it is in whole numbers: every machine decodes the same. A symbol takes 1/8 bits at least (zeros fill the code
up), so that a small file never asks for much memory.

References: Duda, Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding, arXiv:1311.2540, 2013.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

SYMBOLS_PER_BYTE = 64
"""The most symbols that one byte of code stands for: each takes at least 1/8 bits."""
_BITS = 24  # of frequencies
_LEVELS = 64
_AT_ONCE = 2**20  # symbols that are coded at a time: the coder takes 32 bits for each


class Levels(NamedTuple):
    """The levels of all rows, or of all columns. With `are_coded` false they are 1."""

    of: np.ndarray
    are_coded: bool

    @classmethod
    def none(cls, n: int) -> Levels:
        """Those of rows that are alike."""
        return cls(np.ones(n, np.uint8), False)

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> Levels:
        """Those of rows with so many others. A level is 0 only where there are none."""
        roots = np.sqrt(counts)
        step = max(1.0, float(roots.max(initial=0)) / (_LEVELS - 1))
        return cls(np.where(counts > 0, np.maximum(np.rint(roots / step), 1), 0).astype(np.uint8), True)

    @property
    def counts(self) -> np.ndarray:
        """How often each level occurs."""
        return np.bincount(self.of, minlength=1)

    @property
    def bits(self) -> float:
        """About as many as it takes to store them."""
        return _entropy(self.counts) + 8 * len(self.counts) if self.are_coded else 0.0


def encode(symbols: np.ndarray, n_symbols: int) -> bytes:
    """The code of a uint8 array of at least one axis, whose entries are less than `n_symbols`."""
    ans = _package().stack.AnsCoder()
    matrix = symbols.reshape(-1, symbols.shape[-1]) if symbols.size else symbols.reshape(0, 1)
    parts = np.array_split(matrix.reshape(-1), -(-matrix.size // _AT_ONCE) or 1)
    counts = sum((np.bincount(part, minlength=n_symbols) for part in parts), np.zeros(n_symbols, int))
    common = int(counts.argmax())
    is_other = matrix != common
    others = np.delete(counts, common)
    rows, columns = _best_levels(is_other)
    runs: list[tuple[np.ndarray, Sequence[int]]] = []
    for levels in (rows, columns):
        if levels.are_coded:
            runs.append((levels.of, _frequencies(levels.counts)))
    for where, frequencies in _cells(rows, columns, int(others.sum())):
        runs.append((is_other[where].reshape(-1), frequencies))
    numbered = matrix[is_other]
    runs.append((numbered - (numbered > common), _frequencies(others)))
    for run, frequencies in reversed(runs):
        _push(ans, run, frequencies)
    words = ans.get_compressed()
    numbers = [symbols.ndim, *symbols.shape, n_symbols, common]
    for levels in (rows, columns):
        numbers += [1, len(levels.counts), *levels.counts] if levels.are_coded else [0]
    code = b"".join(_varint(int(number)) for number in (*numbers, *others)) + words.astype("<u4").tobytes()
    return code.ljust(-(-symbols.size // SYMBOLS_PER_BYTE), b"\0")


def decode(code: np.ndarray) -> np.ndarray:
    """The symbols, uint8, of a code: a uint8 array. Raises a ValueError if it is none."""
    numbers = _Numbers(code)
    shape = tuple(numbers.read_list(numbers.read(64)))
    size = math.prod(shape)
    if not shape or max(size, *shape) > SYMBOLS_PER_BYTE * len(code):
        raise ValueError(f"it has {len(code)} bytes, too few for symbols of the shape {shape}")
    n_symbols = numbers.read(256)
    common = numbers.read(n_symbols - 1)
    n_columns = shape[-1] if size else 1
    of_rows, of_columns = (numbers.read_list(numbers.read(_LEVELS)) if numbers.read(1) else None for _ in range(2))
    others = numbers.read_list(n_symbols - 1)
    if sum(others) > size:
        raise ValueError(f"it has {sum(others)} symbols, of {size} in all")
    coder = _coder(numbers.rest())
    rows = _pop_levels(coder, of_rows, size // n_columns)
    columns = _pop_levels(coder, of_columns, n_columns)
    if len(rows.counts) * len(columns.counts) > max(len(code), 64):
        raise ValueError("it has more levels than bytes")
    matrix = np.full((size // n_columns, n_columns), common, np.uint8)
    is_other = np.zeros(matrix.shape, bool)
    for where, frequencies in _cells(rows, columns, sum(others)):
        cell_shape = (len(where[0]), where[1].shape[-1])
        is_other[where] = _pop(coder, frequencies, math.prod(cell_shape)).reshape(cell_shape)
    if np.count_nonzero(is_other) != sum(others):
        raise ValueError("its counts are not those of its symbols")
    numbered = _pop(coder, _frequencies(others), sum(others))
    matrix[is_other] = numbered + (numbered >= common)
    if not coder.is_empty():
        raise ValueError("there is more in it than its symbols")
    return matrix.reshape(shape)


def _best_levels(is_other: np.ndarray) -> tuple[Levels, Levels]:
    """The levels of rows and columns with which the others take the fewest bits."""
    n_rows, n_columns = is_other.shape
    of_rows, of_columns = np.count_nonzero(is_other, 1), np.count_nonzero(is_other, 0)
    n_others = int(of_rows.sum())

    def bits(choice: tuple[Levels, Levels]) -> float:
        rows, columns = choice
        in_rows = [np.count_nonzero(is_other[rows.of == r], 0) for r in range(len(rows.counts))]
        in_cell = np.stack([np.bincount(columns.of, n) for n in in_rows])
        total = rows.bits + columns.bits
        for r, c, p in _probabilities(rows, columns, n_others):
            ones, zeros = in_cell[r, c], rows.counts[r] * columns.counts[c] - in_cell[r, c]
            total -= ones * math.log2(p / 2**16) + zeros * math.log2(1 - p / 2**16)
        return total if in_cell.size <= max(total / 8, 64) else math.inf

    choices = itertools.product(
        (Levels.none(n_rows), Levels.of_counts(of_rows)), (Levels.none(n_columns), Levels.of_counts(of_columns))
    )
    return min(choices, key=bits)


def _probabilities(rows: Levels, columns: Levels, n_others: int) -> Iterator[tuple[int, int, int]]:
    """(level of rows, level of columns, 2¹⁶ times the probability of another symbol) of the levels that occur."""
    in_rows, in_columns = rows.counts.tolist(), columns.counts.tolist()
    whole = sum(r * r * n for r, n in enumerate(in_rows)) * sum(c * c * n for c, n in enumerate(in_columns))
    if not n_others or not whole:
        return
    for r, c in itertools.product(range(1, len(in_rows)), range(1, len(in_columns))):
        if in_rows[r] and in_columns[c]:
            yield r, c, min(max((n_others * r * r * c * c << 16) // whole, 1), 2**16 - 1)


def _cells(rows: Levels, columns: Levels, n_others: int) -> Iterator[tuple[tuple[np.ndarray, ...], list[int]]]:
    """(where in the matrix, the frequencies of the common symbol and of the others) of each pair of levels."""
    in_level = [np.nonzero(rows.of == r)[0] for r in range(len(rows.counts))]
    at_level = [np.nonzero(columns.of == c)[0] for c in range(len(columns.counts))]
    for r, c, p in _probabilities(rows, columns, n_others):
        yield np.ix_(in_level[r], at_level[c]), [(2**16 - p) << 8, p << 8]


def _frequencies(counts: Sequence[int] | np.ndarray) -> list[int]:
    """Frequencies that sum up to 2²⁴, of at least 2, for counts that occur."""
    counts = [int(count) for count in counts]
    total, k = sum(counts), len(counts)
    if not total:
        return [2] * k
    found = [2 + count * (2**_BITS - 2 * k) // total for count in counts]
    found[counts.index(max(counts))] += 2**_BITS - sum(found)
    return found


def _entropy(counts: np.ndarray) -> float:
    """Bits of symbols with these counts."""
    counts = counts[counts > 0]
    return float(np.sum(counts * np.log2(counts.sum() / counts)))


def _push(coder: Any, run: np.ndarray, frequencies: Sequence[int]) -> None:
    if run.size and len(frequencies) > 1:
        model = _model(frequencies)
        for start in reversed(range(0, run.size, _AT_ONCE)):
            coder.encode_reverse(run[start : start + _AT_ONCE].astype(np.int32), model)


def _pop(coder: Any, frequencies: Sequence[int], n: int) -> np.ndarray:
    run = np.zeros(n, np.uint8)
    if n and len(frequencies) > 1:
        model = _model(frequencies)
        for start in range(0, n, _AT_ONCE):
            run[start : start + _AT_ONCE] = coder.decode(model, min(n - start, _AT_ONCE))
    return run


def _pop_levels(coder: Any, counts: list[int] | None, n: int) -> Levels:
    if counts is None:
        return Levels.none(n)
    if sum(counts) != n:
        raise ValueError(f"it has levels of {sum(counts)} rows or columns, of {n}")
    levels = Levels(_pop(coder, _frequencies(counts), n), True)
    if not np.array_equal(levels.counts, np.trim_zeros(np.asarray(counts, np.int64), "b")):
        raise ValueError("its counts are not those of its levels")
    return levels


def _model(frequencies: Sequence[int]) -> Any:
    """A model of exactly these frequencies.

    The package gives each symbol a frequency of 1, the rest of 2²⁴ by rounding down sums of probabilities. A quarter
    more of the first, and less of the last, takes these sums away from where an error of rounding would matter.
    """
    rest = np.asarray(frequencies, np.float64) - 1
    rest[0] += 0.25
    rest[-1] -= 0.25
    return _package().model.Categorical(rest / (2**_BITS - len(rest)), perfect=False)


def _coder(data: np.ndarray) -> Any:
    """The coder of the words in `data`, less the zeros that fill it up."""
    words = np.ascontiguousarray(data[: len(data) // 4 * 4]).view("<u4").astype(np.uint32)
    if np.any(data[len(words) * 4 :]):
        raise ValueError("its last word is incomplete")
    return _package().stack.AnsCoder(np.trim_zeros(words, "b"))


def _package() -> Any:
    try:
        return importlib.import_module("constriction").stream
    except ImportError as e:
        raise ImportError("entropy coding needs constriction: pip install 'jaxweights[coding]'") from e


def _varint(number: int) -> bytes:
    code = bytearray()
    while number > 127:
        code.append(number & 127 | 128)
        number >>= 7
    return bytes([*code, number])


class _Numbers:
    """Reads numbers from the front of a code."""

    def __init__(self, code: np.ndarray):
        self._code = code
        self._at = 0

    def read(self, highest: int = 2**59) -> int:
        """A number of at most `highest`."""
        number = shift = 0
        while shift < 63:
            if self._at == len(self._code):
                raise ValueError("it ends too early")
            byte = int(self._code[self._at])
            self._at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128 and number <= highest:
                return number
            if byte < 128:
                break
        raise ValueError(f"it has a number {number} or more, of at most {highest}")

    def read_list(self, n: int) -> list[int]:
        """As many numbers."""
        return [self.read() for _ in range(n)]

    def rest(self) -> np.ndarray:
        """The bytes after the numbers."""
        return self._code[self._at :]
