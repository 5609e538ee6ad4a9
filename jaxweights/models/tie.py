"""Weight tying: one weight in several places of a tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxweights.levels.paths import flatten
from jaxweights.models.ties import Tied, resolve


def tie(params: Any, ties: Mapping[str, str | Tied]) -> Any:
    """Ties weights: replaces some leaves of a tree by others, or by their transposes.

    tie(params, {place: source})[place] = params[source]

    Tie inside the loss: there, the tied leaves are one weight. Its gradient is the sum over all its places, and the
    gradient of the leaves that were replaced is 0. An optimizer that updates a tied tree without tying it in the loss
    moves each leaf by itself. `untie` leaves the replaced leaves out of what is trained and saved.

    A source has the shape of its place, or one that is its transpose in one way only: an embedding (vocabulary, width)
    at a head (width, vocabulary). A square weight is put there as it is: write `Tied(path, transpose=(1, 0))` for its
    transpose. A path of a subtree ties each weight in it: {"layer_1": "layer_0", "layer_2": "layer_0"} makes one layer
    of three, as in ALBERT.

    Outside `jit`, each replaced leaf is a copy with its own memory, so that a tied tree can be donated
    (`donate_argnums`). Inside, a copy costs nothing. A stored weight, such as a `QuantizedArray`, stays stored in
    each place.

    Args:
      params: any pytree of arrays, stored weights or shapes.
      ties: {path to replace: path of what is put there, or `Tied` for a view of it}. A leaf that replaces others must
        not itself be replaced.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: `ties` is not a dict of paths, or a path is that of a leaf that is no array.
      ValueError: `ties` is empty, a path is not in the tree, shapes or dtypes differ, several transposes fit, subtrees
        have different leaves, a leaf is replaced twice, a source is itself replaced, or a stored weight would have to
        be an array.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((3, 2)), "head": jnp.zeros((2, 3))}
    >>> print(tie(params, {"head": "embed"})["head"])
    [[1. 1. 1.]
     [1. 1. 1.]]

    References: Press and Wolf, Using the Output Embedding to Improve Language Models, arXiv:1608.05859, 2016; Lan et
      al., ALBERT: A Lite BERT for Self-supervised Learning of Language Representations, arXiv:1909.11942, 2019.
    """
    tree = flatten(params)
    leaves = tree.by_path
    return tree.replaced({place: tied.view(leaves[tied.path]) for place, tied in resolve(tree, ties).items()})


def untie(params: Any, ties: Mapping[str, str | Tied]) -> tuple[Any, Callable[[Any], Any]]:
    """Splits a tree into its free weights and the function that puts the tied ones back.

    free, whole = untie(params, ties), with whole(free) = tie(params, ties)

    Train, save and compress `free`, and run the model on `whole(free)`. The places of tied weights are None in `free`:
    an optimizer has no state for them, weight decay and norms count each weight once, and a checkpoint has it once.
    Its gradient is the sum over all its places.

    `whole` holds no arrays. It takes any tree with the paths of `free`: after a step, loaded from a file, or with
    weights that are stored. To load a model, make it of shapes: `untie(jax.eval_shape(init, key), ties)`. Outside
    `jit`, `whole(free)` has each weight in full in each of its places, for tools that know of no ties.

    Args:
      params: any pytree of arrays, stored weights or shapes.
      ties: {path to replace: path of what is put there, or `Tied` for a view of it}, as in `tie`.

    Returns:
      (free, whole): `params` with None in the tied places, and a function of trees like `free`.

    Raises:
      TypeError: as `tie`.
      ValueError: as `tie`. `whole` raises it for a tree of other paths.

    >>> import jax, jax.numpy as jnp
    >>> params = {"embed": jnp.ones((3, 2)), "head": jnp.zeros((2, 3))}
    >>> free, whole = untie(params, {"head": "embed"})
    >>> jax.tree.map(jnp.shape, free), jax.tree.map(jnp.shape, whole(free))
    ({'embed': (3, 2), 'head': None}, {'embed': (3, 2), 'head': (2, 3)})
    >>> print(jax.grad(lambda free: (whole(free)["head"] @ whole(free)["embed"]).sum())(free)["embed"])
    [[4. 4.]
     [4. 4.]
     [4. 4.]]

    References: Press and Wolf, Using the Output Embedding to Improve Language Models, arXiv:1608.05859, 2016.
    """
    tree = flatten(params)
    tied = resolve(tree, ties)
    paths, treedef = tree.paths, tree.treedef
    kept = set(paths) - set(tied)

    def whole(free: Any) -> Any:
        """The tree with every tied weight in each of its places."""
        leaves = flatten(free).by_path
        if leaves.keys() != kept:
            missing, more = (sorted(names) or "none" for names in (kept - leaves.keys(), leaves.keys() - kept))
            raise ValueError(
                f"free must have the paths that untie left: it lacks {missing}, and has others: {more}. Pass the first "
                f"result of untie, or a tree like it"
            )
        return treedef.unflatten(tied[p].view(leaves[tied[p].path]) if p in tied else leaves[p] for p in paths)

    return tree.replaced(dict.fromkeys(tied)), whole
