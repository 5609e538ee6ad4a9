"""Ten techniques on one small CNN: what each promises, whether it holds, and what it costs.

    python examples/ten_techniques.py
    python examples/ten_techniques.py --backend nnx --data fashion-mnist

Trains a baseline, the same network with each technique, and one with all of them, and shows a table and a picture. The
runs are interleaved, a round of steps at a time, so background load affects all of them alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax.traverse_util import flatten_dict
from small_cnn import LinenCNN, linen_model, nnx_model

import jaxweights as jw

ROUND = 30
"""Steps between measurements."""
BATCH = 64
STEPS = {"digits": 600, "fashion-mnist": 300}
FLAX_DEFAULT = nn.initializers.lecun_normal()
PLAIN = ("none", "none", "none")


@dataclasses.dataclass(frozen=True)
class Technique:
    """How the network is built and what is done to its weights."""

    name: str
    promise: str
    column: str
    """The table column that shows whether the promise holds."""
    kernel_init: Callable = FLAX_DEFAULT
    norms: tuple[str, str, str] = PLAIN
    transform: Any = None
    """Wraps the module, which then computes with transformed weights."""
    decay: float = 0.0
    project: Any = None
    """Changes the stored weights after each update."""
    stored_bits: int | None = None


def techniques(steps: int) -> list[Technique]:
    pruning = optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=steps // 2, transition_begin=steps // 4)
    return [
        Technique("baseline", "", ""),
        Technique("weight norm", "learned ‖w‖", "norm", transform=jw.WeightNorm()),
        Technique("spectral norm", "σ = 1", "sigma", transform=jw.SpectralNorm()),
        Technique("weight decay", "small ‖w‖", "norm", decay=0.3),
        Technique("weight clipping", "|w| ≤ 0.15", "largest", project=jw.ClipWeights(0.15)),
        Technique("weight sharing", "256 values", "values", transform=jw.ShareWeights(256)),
        Technique("initialization", "quick start", "early", kernel_init=jw.he_normal),
        Technique("batch norm", "quick start", "early", norms=("batch",) * 3),
        Technique("layer norm", "quick start", "early", norms=("layer",) * 3),
        Technique("quantization", "4 bits", "bytes", transform=jw.FakeQuantize(4), stored_bits=4),
        Technique("sparsification", "80% zeros", "zeros", project=jw.Prune(pruning)),
        Technique(
            "all ten",
            "each in place",
            "",
            kernel_init=jw.he_normal,
            norms=("batch", "batch", "layer"),
            transform={
                "conv1/kernel": jw.Chain(jw.WeightNorm(), jw.FakeQuantize(8)),
                "conv2/kernel": jw.Chain(jw.ShareWeights(256), jw.SpectralNorm()),
                "hidden/kernel": jw.Prune(pruning),
                "head/kernel": jw.FakeQuantize(8),
            },
            decay=0.1,
            project=jw.ClipWeights(0.5),
            stored_bits=8,
        ),
    ]


def optimizer(technique: Technique, steps: int) -> optax.GradientTransformation:
    """Adam with weight decay, followed by projections."""
    return optax.chain(
        optax.scale_by_adam(),
        jw.add_weight_decay(technique.decay) if technique.decay else optax.identity(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(4e-3, steps)),
        jw.project(technique.project) if technique.project else optax.identity(),
    )


class Run:
    """A network during training."""

    def __init__(self, technique: Technique, data: image_data.Data, steps: int, build: Callable, seed: int):
        self.technique, self.data = technique, data
        shape = data.train_images.shape[1:]
        self.model = build(shape, technique.norms, technique.kernel_init, technique.transform, seed=seed)
        tx = optimizer(technique, steps)
        self.state = (self.model.params, self.model.rest, jax.jit(tx.init)(self.model.params))
        self.accuracies: list[float] = []
        self.seconds: list[float] = []

        def loss(params, rest, images, labels):
            logits, rest = self.model.forward(params, rest, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), rest

        def train(state, images, labels, batches):
            def step(state, batch):
                params, rest, tx_state = state
                grads, rest = jax.grad(loss, has_aux=True)(params, rest, images[batch], labels[batch])
                updates, tx_state = tx.update(grads, tx_state, params)
                return (optax.apply_updates(params, updates), rest, tx_state), None

            return jax.lax.scan(step, state, batches)[0]

        batches = jax.ShapeDtypeStruct((ROUND, BATCH), jnp.int32)
        self._train = jax.jit(train).lower(self.state, data.train_images, data.train_labels, batches).compile()
        self._predict = jax.jit(lambda p, r, x: self.model.forward(p, r, x, train=False)[0].argmax(-1))

    def advance(self, batches: np.ndarray) -> None:
        """Runs and times a round of steps, then measures the accuracy."""
        start = time.perf_counter()
        state = self._train(self.state, self.data.train_images, self.data.train_labels, batches)
        self.state = jax.block_until_ready(state)
        self.seconds.append(time.perf_counter() - start)
        predicted = self._predict(*self.state[:2], self.data.test_images)
        self.accuracies.append(float(np.mean(predicted == self.data.test_labels)))

    def result(self, baseline: Run) -> report.Result:
        """Measures the weights that the model computes with."""
        variables = self.model.export(*self.state[:2])
        weights = {path: np.asarray(w) for path, w in flatten_dict(variables["params"], sep="/").items()}
        kernels = {path: w for path, w in weights.items() if path.endswith("/kernel")}
        entries = np.concatenate([w.ravel() for w in kernels.values()])
        stored = self.stored(variables)
        return report.Result(
            technique=self.technique,
            curve=self.accuracies,
            kernels=kernels,
            sigma=max(float(jw.spectral_norm(w)) for w in kernels.values()),
            largest=float(np.abs(entries).max()),
            values=max(np.unique(w).size for w in kernels.values()),
            zeros=float(np.mean(entries == 0)),
            norm=float(np.linalg.norm(entries)),
            bytes=sum(a.nbytes for a in jax.tree.leaves(stored, is_leaf=_is_quantized)),
            stored_accuracy=self.accuracy_of(stored),
            cost=float(np.median(np.divide(self.seconds, baseline.seconds))),
        )

    def stored(self, variables: dict) -> dict:
        """`variables` as they would be saved: with quantized kernels if the technique stores few bits."""
        bits = self.technique.stored_bits
        quantize = lambda path, a: jw.quantize(a, bits) if bits and path[-1].key == "kernel" else a
        return jax.tree_util.tree_map_with_path(quantize, variables)

    def accuracy_of(self, stored: dict) -> float:
        """Test accuracy of a plain network with the stored variables."""
        load = lambda a: jw.dequantize(a) if _is_quantized(a) else a
        variables = jax.tree.map(load, stored, is_leaf=_is_quantized)
        logits = LinenCNN(self.technique.norms, self.technique.kernel_init).apply(
            variables, self.data.test_images, train=False
        )
        return float(np.mean(logits.argmax(-1) == self.data.test_labels))


def _is_quantized(a: Any) -> bool:
    return isinstance(a, jw.QuantizedArray)


def main(argv: Sequence[str] | None = None) -> dict[str, report.Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--backend", choices=["linen", "nnx"], default="linen")
    parser.add_argument("--steps", type=int, help=f"per run, rounded up to a multiple of {ROUND}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the batch order")
    parser.add_argument("--out", default="ten_techniques.png", help="path of the picture")
    args = parser.parse_args(argv)

    data = image_data.load(args.data)
    rounds = -(-(args.steps or STEPS[args.data]) // ROUND)
    steps = rounds * ROUND
    batches = image_data.batches(len(data.train_labels), steps, BATCH, args.seed)
    build = {"linen": linen_model, "nnx": nnx_model}[args.backend]
    with report.progress() as progress:
        ways = techniques(steps)
        runs = [Run(way, data, steps, build, args.seed) for way in progress.track(ways, description="compiling")]
        for part in progress.track(batches.reshape(rounds, ROUND, BATCH), description="training"):
            for run in runs:
                run.advance(part)
    results = {run.technique.name: run.result(baseline=runs[0]) for run in runs}
    report.table(f"{args.data}, {args.backend}, {steps} steps of {BATCH} images", results, ROUND)
    report.picture(args.out, results, ROUND)
    return results


if __name__ == "__main__":
    main()
