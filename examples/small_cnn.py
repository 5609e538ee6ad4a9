"""A small CNN in Flax Linen and in Flax NNX, with a common interface for the training loop.

Two strided convolutions, a hidden layer and a head. Each of the first three is followed by an optional norm. Both
versions use the same parameter names ("conv1/kernel", "norm1/scale"), so their weights are interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxweights as jw

CLASSES = 10
CHANNELS = (16, 32)
HIDDEN = 64
STATE = "weight_transform"
"""The collection in which a transformed module keeps its state."""


class LinenCNN(nn.Module):
    norms: tuple[str, str, str]
    kernel_init: Callable

    @nn.compact
    def __call__(self, x, train: bool):
        conv = lambda n, name: nn.Conv(n, (3, 3), strides=2, kernel_init=self.kernel_init, name=name)
        dense = lambda n, name: nn.Dense(n, kernel_init=self.kernel_init, name=name)
        x = nn.relu(self.norm(1, train)(conv(CHANNELS[0], "conv1")(x)))
        x = nn.relu(self.norm(2, train)(conv(CHANNELS[1], "conv2")(x)))
        x = x.reshape(len(x), -1)
        x = nn.relu(self.norm(3, train)(dense(HIDDEN, "hidden")(x)))
        return dense(CLASSES, "head")(x)

    def norm(self, i: int, train: bool):
        match self.norms[i - 1]:
            case "batch":
                return jw.linen.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")
            case "layer":
                return jw.linen.LayerNorm(name=f"norm{i}")
        return lambda x: x


class NNXCNN(nnx.Module):
    def __init__(self, image_shape, norms: tuple[str, str, str], kernel_init: Callable, *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        conv = lambda m, n: nnx.Conv(m, n, (3, 3), strides=2, kernel_init=kernel_init, rngs=rngs)
        dense = lambda m, n: nnx.Linear(m, n, kernel_init=kernel_init, rngs=rngs)
        positions = -(-height // 4) * -(-width // 4)
        self.conv1, self.norm1 = conv(channels, CHANNELS[0]), self.norm(norms[0], CHANNELS[0])
        self.conv2, self.norm2 = conv(*CHANNELS), self.norm(norms[1], CHANNELS[1])
        self.hidden, self.norm3 = dense(positions * CHANNELS[1], HIDDEN), self.norm(norms[2], HIDDEN)
        self.head = dense(HIDDEN, CLASSES)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = x.reshape(len(x), -1)
        x = nnx.relu(self.norm3(self.hidden(x)))
        return self.head(x)

    @staticmethod
    def norm(kind: str, features: int):
        match kind:
            case "batch":
                return jw.nnx.BatchNorm(features, momentum=0.9)
            case "layer":
                return jw.nnx.LayerNorm(features)
        return lambda x: x


class Model(NamedTuple):
    """The interface of a model for training, in Linen or NNX."""

    params: Any
    """Parameters, updated by the optimizer."""
    rest: Any
    """State that the model updates itself: running statistics, the state of a transform."""
    forward: Callable[..., tuple[jax.Array, Any]]
    """(params, rest, images, train) -> (logits, rest)."""
    export: Callable[..., Any]
    """(params, rest) -> the variables of a plain `LinenCNN` that computes the same."""


def linen_model(image_shape, norms, kernel_init, transform=None, *, seed: int = 0) -> Model:
    model = LinenCNN(norms, kernel_init)
    if transform:
        model = jw.linen.Transformed(model, transform)
    rest = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=True)
    params = rest.pop("params")

    def forward(params, rest, images, train):
        return model.apply({"params": params, **rest}, images, train, mutable=list(rest) if train else [])

    def export(params, rest):
        variables = {"params": params, **rest}
        return jw.linen.fold(model, variables) if transform else variables

    return Model(params, rest, forward, export)


def nnx_model(image_shape, norms, kernel_init, transform=None, *, seed: int = 0) -> Model:
    """The NNX model with the initial weights of `linen_model`."""

    def build():
        model = NNXCNN(image_shape, norms, kernel_init, rngs=nnx.Rngs(0))
        return jw.nnx.transformed(model, transform) if transform else model

    model = nnx.eval_shape(build)
    params, rest, *_ = linen_model(image_shape, norms, kernel_init, transform, seed=seed)
    state = {"learned": params.pop(STATE, {}), "fixed": rest.get(STATE, {})}
    for part in (params, rest.get("batch_stats", {}), {STATE: state} if transform else {}):
        nnx.update(model, part)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, rest, images, train):
        model = nnx.merge(graph, params, rest, copy=True)
        model.train() if train else model.eval()
        return model(images), nnx.state(model, nnx.Not(nnx.Param))

    def export(params, rest):
        model = nnx.merge(graph, params, rest)
        plain = jw.nnx.fold(model) if transform else model
        collections = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        return {name: nnx.to_pure_dict(nnx.state(plain, kind)) for name, kind in collections.items()}

    return Model(params, rest, forward, export)
