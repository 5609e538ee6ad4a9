"""Errors and warnings of the library, and what to do. tests/docs/test_messages.py provokes each of them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Message:
    """A message, and what to do about it.

    Attributes:
      says: its text; … stands for what differs.
      means: the cause.
      do: the remedy.
      case: the case of tests/bad_input that raises it, or code that warns.
    """

    says: str
    means: str
    do: str
    case: str


WHERE = [
    Message(
        "where=… selects no weight. The floating-point arrays of this tree are: …",
        "No path of the tree matches. A glob is matched against whole paths: `kernel` is a weight at the top, "
        "`**/kernel` one at any depth.",
        "Take a glob that matches one of the paths in the message.",
        "where a glob",
    ),
    Message(
        "the default where (floating-point arrays with two or more axes except biases, scales, tokens and "
        "positions) selects no weight. …",
        "The tree has vectors only, or nothing that is a float array.",
        'Pass the tree of parameters (`variables["params"]`), or name the weights with `where`.',
        "biases only",
    ),
    Message(
        "where=… selects …, which is stored as a QuantizedArray and no array: …",
        "A stored weight cannot be transformed, drawn anew or decayed.",
        "Leave it out of the glob, or call `jw.densify(params)` first.",
        "where a stored weight",
    ),
    Message(
        "layout names …, which is not in the tree. It has: …",
        "The layout is that of another model, or its paths start elsewhere.",
        "Make the layout of the tree that you pass: `jw.layout(f, params, *args)`.",
        "summarize layout of others",
    ),
]

AXES = [
    Message(
        "axes names input axis …, but the weight has shape …: use axes from …",
        "The `axes` are those of a weight of another rank. The path of the weight stands in front.",
        "Leave `axes` out, so that they follow from the tree; or pass a `layout`.",
        "tree axes",
    ),
    Message(
        "sparsity=… needs a multiple of … inputs, but this weight has …: give a fraction",
        "N:M patterns cut the inputs into groups of m.",
        "Leave the weight out with `where`, or prune it by a fraction.",
        "Prune 1:3",
    ),
    Message(
        "scale must have shape …, one per output unit of w …, got …",
        "A learned scale belongs to another weight, or to a weight with other axes.",
        "Make the state with `init` of the tree that you apply it to.",
        "tree scale",
    ),
]

STATE = [
    Message(
        "the state has no …, it has …: pass the state that init returned for this weight (in Flax Linen, all its "
        "collections)",
        "`apply` got the state of another transform, or none. In Linen: only `params` was passed.",
        "Pass all collections: `model.apply(variables, x)`. After loading a plain checkpoint, call "
        "`jw.linen.init_state`.",
        "linen without state",
    ),
    Message(
        "the state has … of shape …, this weight needs …: pass the state that init returned for this weight …",
        "The state is that of a model of another size.",
        "Call `init` again, or `jw.linen.init_state` or `jw.nnx.init_state` for weights that were loaded.",
        "tree state shape",
    ),
    Message(
        "state must be the TreeState that init returned, got dict",
        "The state of a tree is a `jw.TreeState`; a checkpoint may have made a dict of it.",
        "Restore it into the state that `init` returns, as the target of the checkpoint library.",
        "state no TreeState",
    ),
    Message(
        "project needs the parameters: call tx.update(grads, state, params)",
        "A projection depends on the weights. optax passes them only if you do.",
        "Pass `params` as third argument of `tx.update`.",
        "project without params",
    ),
    Message(
        "the score saliency needs the gradients: call update(w, state, grad), or in an optax chain use confine",
        "The score is a function of the gradient.",
        "Take `jw.confine`, which passes gradients, or `tx.update(updates, state, params, grad=grads)`.",
        "saliency without gradients",
    ),
    Message(
        "Transformed got a module that is itself a Transformed: compose the transforms instead, …",
        "Two wrappers around one module.",
        "Write `jw.linen.Transformed(module, jw.Chain(inner, outer))`.",
        "linen twice",
    ),
]

NUMBERS = [
    Message(
        "… got the class …: make an instance, …",
        "A transform or a method was passed as a class.",
        "Write `jw.SpectralNorm()` with parentheses.",
        "on_tree of a class",
    ),
    Message(
        "sparsity must be in [0, 1], got …: for k of n weights or units, write k / n",
        "Sparsity is a fraction of zeros, never a count.",
        "Write `k / n`.",
        "Prune 3 units",
    ),
    Message(
        "limit must be a number here, got the callable …: evaluate it at the step first",
        "Array functions take no schedules. Transforms do.",
        "Pass `schedule(step)`, or use the transform.",
        "limit schedule",
    ),
    Message(
        "low must be a number, got NaN: look where it was computed",
        "A hyper-parameter is NaN.",
        'Find where it became so: `jax.config.update("jax_debug_nans", True)`.',
        "low NaN",
    ),
    Message(
        "w must be a floating-point array, got …: for a tree use jax.tree.map, on_tree or one_shot; else convert "
        "it with jnp.asarray",
        "An array function got a tree, a list or a Python number.",
        "Take `jw.on_tree` for a tree.",
        "weight a dict",
    ),
]

MODELS = [
    Message(
        "there are no statistics of the inputs: pass stats=capture(f, params, batches)",
        "The method depends on data, and `one_shot` got none.",
        "Take `jw.compress`, which captures them, or pass `stats=jw.capture(...)`.",
        "one_shot without data",
    ),
    Message(
        "it is given a QuantizedArray: put the method that stores a weight last",
        "A method follows one that already stores the weight.",
        "Prune first, then store: `(SparseGPT((2, 4)), GPTQ(4))`.",
        "GPTQ twice",
    ),
    Message(
        "batches must be an iterable of batches, got …: write [batch]",
        "One array was passed where a list of batches belongs.",
        "Write `[batch]`.",
        "compress one batch",
    ),
    Message(
        "capture found no product of data with all of …: leave it out of `where`",
        "The weight is never multiplied by data in this call: it is unused, or only added.",
        "Leave it out, or call the model so that the weight is used.",
        "compress a bias",
    ),
    Message(
        "layers leaves out the batch norms …: name the layer before each",
        "`fold_batch_norms` must know where each norm goes.",
        "Pass what `jw.linen.norm_folds`, `jw.nnx.norm_folds` or `jw.norm_folds` reads off the model; "
        "`keep_norms=True` leaves the others in place.",
        "fold leaves out",
    ),
    Message(
        "ties puts … at …: they must have one shape and dtype, up to a transpose or an index in Tied",
        "The two weights differ in shape or dtype.",
        "Name the view with `jw.Tied(path, transpose=..., index=...)`.",
        "tie shapes",
    ),
]

WARNINGS = [
    Message(
        "the axes of … are a guess: … is taken, and … fits too. Read them off the program with layout=…",
        "`jw.AxesWarning`: the shape of the weight can be read in two ways, and this technique tells them apart.",
        "Pass `layout=jw.layout(f, params, *args)`, or `axes=` to the transform. It warns once a path.",
        'jw.on_tree(jw.SpectralNorm()).init({"docs_example": {"kernel": jnp.ones((8, 2, 4))}}, key)',
    ),
    Message(
        "weights are differentiated under …, and its state stays as it is: …",
        "`jw.StaleStateWarning`: a weight is being differentiated while the state of its transform stays as it is.",
        'In Linen, pass `mutable=["weight_transform"]` in the training step. In NNX, call `model.train()`. Or use '
        "`jw.project`.",
        "jax.grad(lambda v: model.apply(v, x).sum())(variables)",
    ),
    Message(
        "Chain moves the zeros of a mask to other values: …, or put the mask last",
        "What was pruned does not stay at zero.",
        "Follow the remedy in the message, such as `keep_zeros=True`.",
        "jw.Chain(jw.Prune(0.9), jw.FakeQuantize(8))",
    ),
    Message(
        "a Linear within a transformed module is called by itself: it computes with the weights as they are stored. …",
        "`jw.nnx.StoredWeightsWarning`: a part of the module was called, not the module.",
        "Call a method of the transformed module, or transform the part.",
        "jw.nnx.transformed(nnx.Sequential(nnx.Linear(6, 3, rngs=nnx.Rngs(0))), jw.ClipWeights(1.0)).layers[0](x)",
    ),
]

GROUPS = {"where": WHERE, "axes": AXES, "state": STATE, "numbers": NUMBERS, "models": MODELS, "warnings": WARNINGS}


def entries(group: str) -> str:
    """The messages of a group as Markdown."""
    return "\n\n".join(f"```text\n{m.says}\n```\n\n{m.means} {m.do}" for m in GROUPS[group])
