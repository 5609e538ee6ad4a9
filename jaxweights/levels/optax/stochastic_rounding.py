"""Unbiased updates of 16-bit weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxweights.core.checks import check_key
from jaxweights.core.tracing import traced_once
from jaxweights.levels.paths import check_params, check_structure, flatten, is_weight, key_of
from jaxweights.numerics.rounding import stochastic_delta


class StochasticRoundingState(NamedTuple):
    """State of `round_stochastically`: the key of the next step."""

    key: jax.Array


def round_stochastically(key: jax.Array) -> optax.GradientTransformation:
    """Makes the updates of 16-bit weights unbiased: put it last in an `optax.chain`, or before `project`.

    Replaces the update u of a weight p by u' such that p + u' is one of the two values of p's dtype around p + u, the
    upper one with probability (p + u − lower)/(upper − lower). So E[p + u'] = p + u. `optax.apply_updates` alone takes
    the nearest value, and an update of less than half its spacing is lost: in bfloat16, 1 − 1e-3 is 1.

    The u' of a 16-bit weight is float32; other weights keep their update. A `project` after this keeps its constraints
    bit for bit and the weights that it does not change unbiased. In `confine`, this is the last part of the optimizer.

    It cannot restore what was lost before it: the moments of an optimizer on bfloat16 weights are bfloat16 too, unless
    it is given them in float32.

    Args:
      key: a key of `jax.random`. Each step and each weight has its own, derived from it.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `key` is not a key.
      ValueError: (when used) `params` is None.

    >>> import jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
    >>> tx = optax.chain(optax.sgd(1e-3), round_stochastically(jax.random.key(0)))
    >>> updates, _ = tx.update({"w": jnp.ones(10_000)}, tx.init(params), params)
    >>> print(jnp.unique(updates["w"]), f"{jnp.mean(updates['w']):.4f}")
    [-0.00390625  0.        ] -0.0010

    References: Gupta, Agrawal, Gopalakrishnan and Narayanan, Deep Learning with Limited Numerical Precision,
    arXiv:1502.02551, 2015; Zamirai, Zhang, Aberger and De Sa, Revisiting BFloat16 Training, arXiv:2010.06192, 2020.
    """
    check_key(key)

    def init(params):
        del params
        return StochasticRoundingState(jnp.copy(key))  # or the caller's key would be donated with the state

    def update(updates, state, params=None):
        check_params("round_stochastically", params)
        weights, updates = flatten(params), flatten(updates)
        check_structure("round_stochastically", "updates", updates, weights)
        now, following = jax.random.split(state.key)
        by_path = weights.by_path
        rounded = {
            path: _rounded(None, key_of(now, path), by_path[path], u)
            for path, u in updates.by_path.items()
            if is_weight(by_path[path]) and by_path[path].dtype.itemsize == 2
        }
        return updates.replaced(rounded), StochasticRoundingState(following)

    return optax.GradientTransformation(init, update)


@traced_once
def _rounded(_, key: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
    return stochastic_delta(key, p, u)
