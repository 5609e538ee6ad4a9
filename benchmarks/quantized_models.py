"""What quantization leaves of two real models: MiniLM-L6 and MobileNetV2, in every format and by every method."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Effort, compare, function

import jaxweights as jw
from jaxweights import files
from jaxweights.formats import FP8_E4M3, MXFP4, NF4, NVFP4, Format, integers
from jaxweights.methods import AWQ, GPTQ, Method, RoundToNearest
from jaxweights.ranges import HQQ, MSE

METHODS: dict[str, Callable[[Format], Method]] = {
    "round to nearest": RoundToNearest,
    "MSE range": partial(RoundToNearest, range=MSE()),
    "HQQ": partial(RoundToNearest, range=HQQ()),
    "AWQ": AWQ,
    "GPTQ": partial(GPTQ, range=MSE(), act_order=True, static_groups=True),
}
FORMATS = {
    "8 bits": integers(8),
    "6 bits": integers(6),
    **{f"{bits} bits": integers(bits, block=128, scale="float16") for bits in (4, 3, 2)},
    **{
        f"{bits} bits, zero points": integers(bits, block=64, symmetric=False, scale="float16")
        for bits in (8, 6, 4, 3, 2)
    },
    **{"FP8 E4M3": FP8_E4M3, "NF4": NF4, "MXFP4": MXFP4, "NVFP4": NVFP4},
}
"""Of MiniLM: integers of up to 4 bits in blocks of 128 inputs, of more with one scale per output unit."""
QUICK = ("4 bits", "4 bits, zero points")
WORD_AXES = jw.Axes(input=1, output=0)
TIMED = ("8 bits", "6 bits", "4 bits", "3 bits", "2 bits", "FP8 E4M3", "NF4", "MXFP4", "NVFP4")
BATCHES = ((1, 16), (32, 32))
"""(sentences, tokens of each) of the batches that are timed."""
MOBILENET_BITS = (8, 6, 4)
CORRECTED = ("round to nearest", "GPTQ")
"""The methods with which the biases of MobileNetV2 are corrected, too."""
PHOTOS = ("china.jpg", "flower.jpg")


def fits(format: Format, methods: Mapping[str, Callable[[Format], Method]]) -> dict[str, Method]:
    """The methods that suit a format: HQQ is one for zero points."""
    return {name: make(format) for name, make in methods.items() if format.zero_point or name != "HQQ"}


def stored_leaves(tree: Any) -> list[jw.QuantizedArray]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, jw.QuantizedArray))
    return [leaf for leaf in leaves if isinstance(leaf, jw.QuantizedArray)]


def bits_per_weight(tree: Any) -> float:
    """Of what is stored, with scales, zero points and all."""
    stored = stored_leaves(tree)
    return 8 * sum(q.nbytes for q in stored) / sum(np.prod(q.shape) for q in stored)


def file_bytes(tree: Any) -> int:
    """The size of the file of a tree, which is read again to see that it is the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        files.save(path, tree)
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(files.load(path)), strict=True):
            np.testing.assert_array_equal(one, other)
        return path.stat().st_size


def words_in_8_bits(params: Any) -> dict[str, Any]:
    """The parameters of MiniLM with the table of words in 8 bits, and a scale per word."""
    return {**params, "words": {"embedding": jw.quantize(params["words"]["embedding"], 8, axes=WORD_AXES)}}


def minilm(quick: bool, status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: calibrated on Shakespeare's sentences, compared on those of other works."""
    import minilm_model

    status("MiniLM: statistics")
    model, params = minilm_model.MiniLM(), minilm_model.weights()["params"]
    calibration = minilm_model.shakespeare(16 if quick else 128, held_out=False)
    held_out = minilm_model.shakespeare(4 if quick else 100, held_out=True)
    stats = jw.linen.capture(model, {"params": params}, calibration, "layers/**/kernel")
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    embed = lambda params: np.concatenate([run(params, tokens) for tokens in held_out])
    of_floats = embed(params)

    yield {"format": "float32", "method": "", "bits": 32.0, "cosine": 1.0, "file": file_bytes(params)}
    for name in QUICK if quick else FORMATS:
        for method, fit in fits(FORMATS[name], METHODS).items():
            status(f"MiniLM: {name}, {method}")
            start = time.perf_counter()
            new = jw.one_shot(params, fit, stats)
            seconds = time.perf_counter() - start
            cosines = np.sum(embed(jw.densify(new)) * of_floats, 1)
            found = {"format": name, "method": method, "bits": bits_per_weight(new), "seconds": seconds}
            found |= {"cosine": float(cosines.mean()), "least": float(cosines.min())}
            yield found | {"file": file_bytes(words_in_8_bits(new))}


def minilm_times(quick: bool, effort: Effort, status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: time per batch on stored weights, over that of the model in float32, and the largest difference."""
    import minilm_model

    model, params = minilm_model.MiniLM(), minilm_model.weights()["params"]
    apply = lambda params, tokens: model.apply({"params": params}, tokens)
    axes = jw.linen.layout(model, {"params": params}, np.ones((1, 8), int))
    for name in QUICK[:1] if quick else TIMED:
        nearest = RoundToNearest(FORMATS[name])
        new = words_in_8_bits(jw.one_shot(params, nearest, where="layers/**/kernel", layout=axes))
        for shape in BATCHES[:1] if quick else BATCHES:
            status(f"MiniLM: time of {name}, {shape}")
            tokens = jnp.asarray(np.random.default_rng(0).integers(1000, 20000, shape))
            stored = jax.jit(jw.with_stored(apply))
            result = compare(function(stored, new, tokens), function(apply, params, tokens), effort)
            error = jnp.abs(stored(new, tokens) - jax.jit(apply)(jw.densify(new), tokens)).max()
            found = {"format": name, "shape": shape, "error": float(error), "ratio": dataclasses.asdict(result.ratio)}
            yield found | {"ms": result.ours.median * 1e3, "float_ms": result.theirs.median * 1e3}


def mobilenet(quick: bool, status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: the norms are folded first; integers with one scale per channel, and nothing else is quantized."""
    import mobilenet as example
    from mobilenet_v2 import MobileNetV2, pretrained
    from sklearn.datasets import load_sample_image

    status("MobileNetV2: statistics")
    variables, model = pretrained(), MobileNetV2(norm=False)
    photos = {name: load_sample_image(name) for name in PHOTOS}
    images = jnp.concatenate([example.crops(photo, 4 if quick else 64) for photo in photos.values()])
    calibration = [random_crops(photo, 2 if quick else 32) for photo in photos.values()]
    folds = jw.linen.norm_folds(MobileNetV2(), variables, images[:1])
    params = jax.jit(lambda v: jw.fold_batch_norms(v["params"], v["batch_stats"], folds))(variables)
    apply = lambda params, x: model.apply({"params": params}, x)
    run = jax.jit(apply)
    parts = range(0, len(images), 32)
    logits = lambda params: np.concatenate([run(params, images[i : i + 32]) for i in parts])
    of_floats = logits(params)
    stats = jw.linen.capture(model, {"params": params}, calibration)

    def row(new: Any, values: Any) -> dict[str, Any]:
        y = logits(values)
        noise = float(np.sum((y - of_floats) ** 2) / np.sum(of_floats**2))
        agreement = float(np.mean(y.argmax(1) == of_floats.argmax(1)))
        return {"bits": bits_per_weight(new), "agreement": agreement, "snr": -10 * np.log10(noise)}

    for bits in MOBILENET_BITS[-1:] if quick else MOBILENET_BITS:
        for method, fit in fits(integers(bits), METHODS).items():
            status(f"MobileNetV2: {bits} bits, {method}")
            start = time.perf_counter()
            new = jw.one_shot(params, fit, stats)
            seconds = time.perf_counter() - start
            values, found = jw.densify(new), {"format": f"{bits} bits"}
            yield {**found, "method": method, "seconds": seconds, **row(new, values)}
            if method in CORRECTED:
                start = time.perf_counter()
                values = jw.correct_biases(apply, params, values, calibration)
                seconds += time.perf_counter() - start
                yield {**found, "method": f"{method}, biases corrected", "seconds": seconds, **row(new, values)}


def random_crops(photo: np.ndarray, n: int) -> jax.Array:
    """Crops of random places and sizes, half of them mirrored, preprocessed as in training: (n, 224, 224, 3)."""
    from mobilenet_v2 import MEAN, STD

    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        side = int(rng.uniform(0.5, 1) * min(photo.shape[:2]))
        top, left = (rng.integers(0, length - side + 1) for length in photo.shape[:2])
        crop = jnp.float32(photo[top : top + side, left : left + side]) / 255
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        found.append((jax.image.resize(crop, (224, 224, 3), "linear") - jnp.array(MEAN)) / jnp.array(STD))
    return jnp.stack(found)
