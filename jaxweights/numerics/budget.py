"""One option of several for each item, of the least total error within a budget: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_RESOLUTION = 20_000


def least_error(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option of each item such that the sum of errors is least and that of costs within the budget.

    Costs beyond the cheapest option of each item are rounded up to a unit: their common divisor, if the room in the
    budget is at most 20,000 of it and the choice is then the best; else 1/20,000 of the room. The cheapest options must
    fit.

    >>> least_error([[1, 5], [1, 5]], [[0.5, 0.25], [4.0, 1.0]], 7)
    [0, 1]

    References: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.
    """
    extra = [[cost - min(of_item) for cost in of_item] for of_item in costs]
    room = budget - sum(map(min, costs))
    divisor = math.gcd(*(cost for of_item in extra for cost in of_item)) or 1
    unit = max(divisor, -(-room // _RESOLUTION))
    n_units = min(room // unit, sum(-(-max(of_item) // unit) for of_item in extra))
    best = np.zeros(n_units + 1)  # the least error of the items so far, with so many units
    taken = []
    for of_item, error in zip(extra, errors, strict=True):
        with_option = np.full((len(of_item), n_units + 1), np.inf)
        for i, cost in enumerate(of_item):
            units = -(-cost // unit)
            if units <= n_units:
                with_option[i, units:] = error[i] + best[: n_units + 1 - units]
        taken.append(np.argmin(with_option, 0))
        best = np.min(with_option, 0)
    chosen, left = [], n_units
    for of_item, options in zip(reversed(extra), reversed(taken), strict=True):
        chosen.insert(0, int(options[left]))
        left -= -(-of_item[chosen[0]] // unit)
    return chosen
