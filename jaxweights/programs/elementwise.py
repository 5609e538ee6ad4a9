"""The primitives that work entry by entry, and what each leaves of its operand."""

from __future__ import annotations

import enum


class Elementwise(enum.Enum):
    """What an elementwise operation leaves of an operand that has the shape of the result."""

    PLACED = "the array itself; where it lies or when it is computed is prescribed"
    KEPT = "the same entries, cast, scaled, shifted, masked, clipped or rounded"
    MAPPED = "any function of the entries"


_KINDS = {
    Elementwise.PLACED: ("mesh_cast", "optimization_barrier", "reshard", "sharding_constraint"),
    Elementwise.KEPT: (
        *("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient"),
        *("abs", "add", "clamp", "div", "floor", "max", "min", "mul", "neg", "round", "select_n", "sign", "sub"),
    ),
    Elementwise.MAPPED: (
        *("and", "atan2", "cbrt", "ceil", "cos", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "ge", "gt"),
        *("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "ne", "nextafter", "not", "or", "pow"),
        *("rem", "rsqrt", "sin", "sqrt", "square", "tan", "tanh", "xor"),
    ),
}

ELEMENTWISE = {name: kind for kind, names in _KINDS.items() for name in names}
"""{name of a primitive: its kind}"""
