"""Image datasets that need no download: scikit-learn's digits, and Fashion-MNIST from a Debian package."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Data(NamedTuple):
    """Images (n, height, width, 1), standardized over the training set, and their classes."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str) -> Data:
    data = {"digits": digits, "fashion-mnist": fashion_mnist}[name]()
    mean, std = data.train_images.mean(), data.train_images.std()
    return data._replace(train_images=(data.train_images - mean) / std, test_images=(data.test_images - mean) / std)


def digits() -> Data:
    """1,797 handwritten digits, 8x8 pixels; 30% of each class is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    return Data(train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32))


def fashion_mnist() -> Data:
    """60,000 + 10,000 pictures of clothing, 28x28 pixels."""
    if not FASHION_MNIST.is_dir():
        raise SystemExit(f"{FASHION_MNIST} is missing: install it with `apt install dataset-fashion-mnist`")
    return Data(_images("train"), _labels("train"), _images("t10k"), _labels("t10k"))


def batches(n: int, steps: int, size: int, seed: int) -> np.ndarray:
    """Indices of shape (steps, size): every image once per epoch, reshuffled each epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * size // n)
    return np.concatenate([rng.permutation(n) for _ in range(epochs)])[: steps * size].reshape(steps, size)


def _images(part: str) -> np.ndarray:
    return _idx(f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28, 1).astype(np.float32)


def _labels(part: str) -> np.ndarray:
    return _idx(f"{part}-labels-idx1-ubyte.gz", header=8).astype(np.int32)


def _idx(file: str, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress((FASHION_MNIST / file).read_bytes()), np.uint8, offset=header)
