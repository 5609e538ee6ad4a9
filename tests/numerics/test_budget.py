"""The choice within a budget is the best of all."""

import itertools

import numpy as np
import pytest

from jaxweights.numerics.budget import least_error


def brute_force(costs, errors, budget):
    """The least error of all choices that fit."""
    totals = []
    for choice in itertools.product(*map(range, map(len, costs))):
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget:
            totals.append(sum(e[i] for e, i in zip(errors, choice, strict=True)))
    return min(totals)


@pytest.mark.parametrize("scale", [1, 1024, 999_983])
def test_the_choice_is_the_best_of_all(scale):
    rng = np.random.default_rng(scale)
    for _ in range(30):
        sizes = rng.integers(1, 5, rng.integers(1, 6))
        costs = [[int(c) * scale for c in rng.integers(1, 40, n)] for n in sizes]
        errors = [list(rng.exponential(size=n)) for n in sizes]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        for budget in (least, int(rng.integers(least, most + 1)), most):
            chosen = least_error(costs, errors, budget)
            assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
            assert sum(e[i] for e, i in zip(errors, chosen, strict=True)) == pytest.approx(
                brute_force(costs, errors, budget)
            )


def test_costs_that_share_no_divisor_are_rounded_up():
    rng = np.random.default_rng(0)
    costs = [[int(c) for c in rng.integers(10**6, 10**7, 4)] for _ in range(6)]
    errors = [sorted(rng.exponential(size=4)) for _ in range(6)]
    budget = sum(map(min, costs)) + 12_345_678
    chosen = least_error(costs, errors, budget)
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
    # No worse than the best choice with the room that rounding takes left out.
    tighter = budget - 6 * 12_345_678 // 20_000 - 6
    total = sum(e[i] for e, i in zip(errors, chosen, strict=True))
    assert brute_force(costs, errors, budget) <= total <= brute_force(costs, errors, tighter)
