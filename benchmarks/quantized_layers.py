"""Layers quantized by jaxweights, Qwix and torchao side by side: same weights, same formats, same data.

The conventions differ. For symmetric integers of b bits, jaxweights scales max|w| to 2^(b−1) − 1, Qwix to
2^(b−1) − 1/2 and clips what is rounded beyond, torchao's default to 2^(b−1) − 1/2 with 2^b codes. For MXFP4, the scale
is the power of two below max|w|/4 with jaxweights and torchao, as the standard says, and the one above max|w|/6 with
Qwix. NVFP4 of Qwix has no factor for the whole matrix. NF4 of torchao has scales in 8 bits (double quantization).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import Effort, Program, compare, function

import jaxweights as jw
from jaxweights.calibration import InputStats
from jaxweights.formats import FP8_E4M3, MXFP4, NF4, NF4_DOUBLE, NVFP4, Format, integers
from jaxweights.methods import AWQ, GPTQ, Method, RoundToNearest
from jaxweights.ranges import MSE

PEERS = ("qwix", "torchao")
FORMATS = {
    "int8, per channel": integers(8),
    "int4, blocks of 128": integers(4, block=128),
    "FP8 E4M3, per channel": FP8_E4M3,
    "NF4, blocks of 64": NF4,
    "NF4, scales in 8 bits": NF4_DOUBLE,
    "MXFP4": MXFP4,
    "NVFP4": NVFP4,
}
INT8, INT4, FP8, NF4_PLAIN, NF4_SCALES, MX, NV = FORMATS
BY_METHODS = (INT8, INT4, MX)
"""The formats in which other methods than round to nearest are compared."""
SIDE, ROWS = 4096, (1, 16)


class Stored(NamedTuple):
    """A matrix (in, out) as a package stores it.

    Attributes:
      values: what it stands for.
      nbytes: bytes in memory.
      times: makes a program of x @ w. None: the package has none for it on this device.
    """

    values: np.ndarray
    nbytes: int
    times: Callable[[np.ndarray], Program] | None


class Way(NamedTuple):
    """A way to quantize a matrix: which package, method and format, and (w, statistics of its inputs) -> `Stored`."""

    package: str
    method: str
    format: str
    store: Callable[[np.ndarray, InputStats], Stored]


def ours(method: Method, w: np.ndarray, stats: InputStats) -> Stored:
    q: Any = jax.block_until_ready(_fit(method, jnp.asarray(w), stats))
    return Stored(np.asarray(q.todense()), q.nbytes, lambda x: function(jw.matmul, jnp.asarray(x), q))


@partial(jax.jit, static_argnums=0)
def _fit(method: Method, w: jax.Array, stats: InputStats) -> Any:
    return method.fit(w, stats)


def our_ways() -> Iterator[Way]:
    methods: dict[str, Callable[[Format], Method]] = {
        "round to nearest": RoundToNearest,
        "MSE range": partial(RoundToNearest, range=MSE()),
        "AWQ": AWQ,
        "AWQ, MSE range": partial(AWQ, range=MSE()),
        "GPTQ": GPTQ,
        "GPTQ, MSE range": partial(GPTQ, range=MSE(), act_order=True, static_groups=True),
    }
    for name, format in FORMATS.items():
        for method, make in methods.items():
            if method == "round to nearest" or name in BY_METHODS:
                yield Way("jaxweights", method, name, partial(ours, make(format)))


def qwix_ways() -> Iterator[Way]:
    import qwix
    from qwix.contrib import awq_core, gptq_core

    kinds = {
        INT8: {"qtype": jnp.int8},
        INT4: {"qtype": jnp.int4, "tiled_axes": {0: 128}},
        FP8: {"qtype": jnp.float8_e4m3fn},
        NF4_PLAIN: {"qtype": "nf4", "tiled_axes": {0: 64}},
        MX: {"qtype": "mxfp4", "tiled_axes": {0: 32}},
        NV: {"qtype": "nvfp4", "tiled_axes": {0: 16}},
    }

    def stored(q: qwix.QArray, input_scale: jax.Array | None = None) -> Stored:
        w = qwix.dequantize(q) if input_scale is None else qwix.dequantize(q) / input_scale[:, None]
        arrays = [a for a in (q.qvalue, q.scale, input_scale) if a is not None]
        nbytes = sum(a.on_device_size_in_bytes() for a in arrays)
        times = lambda x: function(qwix.dot, jnp.asarray(x), q)
        return Stored(np.asarray(w), nbytes, times if input_scale is None else None)

    def nearest(quantize: Callable[[jax.Array], qwix.QArray], w: np.ndarray, stats: InputStats) -> Stored:
        return stored(jax.block_until_ready(quantize(jnp.asarray(w))))

    def how(kind: dict[str, Any]) -> Any:  # GPTQ and AWQ take the matrix (out, in)
        tiles = {1: kind["tiled_axes"][0]} if "tiled_axes" in kind else {}
        return gptq_core.qarray.HowToQuantize(qtype=kind["qtype"], channelwise_axes=(0,), tiled_axes=tiles)

    def gptq(kind: dict[str, Any], w: np.ndarray, stats: InputStats) -> Stored:
        q, _ = gptq_core.quantize_weight(jnp.asarray(w.T), stats.second_moment, how(kind))
        return stored(q.T)

    def awq(quantize: Callable[..., Any], w: np.ndarray, stats: InputStats) -> Stored:
        q, s = quantize(jnp.asarray(w.T), stats.mean_abs)
        return stored(q.T, s[0])

    for name, kind in kinds.items():
        quantize = jax.jit(partial(qwix.quantize, channelwise_axes=(1,), **kind))
        yield Way("Qwix", "round to nearest", name, partial(nearest, quantize))
        if name in BY_METHODS:
            yield Way("Qwix", "AWQ", name, partial(awq, jax.jit(partial(awq_core.quantize_weight, how=how(kind)))))
    yield Way("Qwix", "GPTQ", INT4, partial(gptq, kinds[INT4]))


def torchao_ways() -> Iterator[Way]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization as ao
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
        from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm

    def nbytes(tensor: Any) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.numel() * tensor.element_size()
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    def stored(tensor: Any, dense: Any, multiplies: bool = True) -> Stored:
        def times(x: np.ndarray) -> Program:
            inputs = torch.from_numpy(x)

            def run(n: int) -> None:
                with torch.no_grad():
                    for _ in range(n):
                        torch.nn.functional.linear(inputs, tensor)

            return run

        return Stored(dense.detach().float().numpy().T, nbytes(tensor), times if multiplies else None)

    def configured(config: Any, w: np.ndarray, stats: InputStats) -> Stored:
        layer = torch.nn.Linear(*w.shape, bias=False)
        layer.weight.data = torch.from_numpy(w.T.copy())
        ao.quantize_(layer, config)
        return stored(layer.weight, layer.weight.dequantize())

    def nf4(w: np.ndarray, stats: InputStats) -> Stored:
        tensor = ao.to_nf4(torch.from_numpy(w.T.copy()), 64, 256)
        return stored(tensor, tensor.get_original_weight())

    def mxfp4(w: np.ndarray, stats: InputStats) -> Stored:
        tensor = MXTensor.to_mx(torch.from_numpy(w.T.copy()), torch.float4_e2m1fn_x2, 32)
        return stored(tensor, tensor.dequantize(torch.float32), multiplies=False)

    def nvfp4(w: np.ndarray, stats: InputStats) -> Stored:
        weight = torch.from_numpy(w.T.copy())
        tensor = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
        return stored(tensor, tensor.dequantize(torch.float32))

    int4 = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(128)}
    hqq = ao.IntxWeightOnlyConfig(**int4, intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY)
    stores = {
        INT8: partial(configured, ao.Int8WeightOnlyConfig()),
        INT4: partial(configured, ao.IntxWeightOnlyConfig(**int4)),
        FP8: partial(configured, ao.Float8WeightOnlyConfig()),
        NF4_SCALES: nf4,
        MX: mxfp4,
        NV: nvfp4,
    }
    for name, store in stores.items():
        yield Way("torchao", "round to nearest", name, store)
    yield Way("torchao", "HQQ scales", INT4, partial(configured, hqq))


def installed() -> list[str]:
    """The peers that are here."""
    return [name for name in PEERS if importlib.util.find_spec(name)]


def ways(packages: list[str], quick: bool) -> list[Way]:
    found = [*our_ways()]
    if "qwix" in packages:
        found += qwix_ways()
    if "torchao" in packages:
        found += torchao_ways()
    return [way for way in found if not quick or (way.format == INT4 and way[:2] != ("Qwix", "GPTQ"))]


class Layer(NamedTuple):
    """A kernel (in, out) of MiniLM, and the statistics of its inputs on sentences to calibrate on and on others."""

    w: np.ndarray
    calibration: InputStats
    held_out: InputStats


def layers(quick: bool) -> dict[str, Layer]:
    """Kernels of the first layer: four heads of the queries, and both of the perceptron."""
    import minilm_model

    model, variables = minilm_model.MiniLM(), minilm_model.weights()
    names = ("attention/query", "up", "down")
    where = [f"layers/{name}/kernel" for name in names]
    n = 16 if quick else 64
    stats = [
        jw.linen.capture(model, variables, minilm_model.shakespeare(n, held_out=held_out), where)
        for held_out in (False, True)
    ]
    found = {}
    for name in names[:1] if quick else names:
        kernel = variables["params"]["layers"]
        for key in name.split("/"):
            kernel = kernel[key]
        w = np.asarray(kernel["kernel"][0])
        of_first = lambda s: dataclasses.replace(jax.tree.map(lambda a: a[0], s), axes=None)
        both = [of_first(s[f"layers/{name}/kernel"]) for s in stats]
        w = w[:, :4].reshape(w.shape[0], -1) if name == "attention/query" else w
        found["query, 4 heads" if name == "attention/query" else name] = Layer(w, *both)
    return found


def errors(quick: bool, packages: list[str], status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: errors of the weight and of the outputs on held-out data, relative, and bits per weight.

    Qwix's GPTQ takes most of a minute for the smallest layer, so it is given no other.
    """
    status("layers of MiniLM")
    for name, layer in layers(quick).items():
        for way in ways(packages, quick):
            if way[:2] == ("Qwix", "GPTQ") and layer.w.shape[1] > 128:
                continue
            status(f"{name}: {way.package}, {way.format}, {way.method}")
            start = time.perf_counter()
            stored = way.store(layer.w, layer.calibration)
            found = {"layer": name, "package": way.package, "format": way.format, "method": way.method}
            delta, h = stored.values - layer.w.astype(np.float64), np.asarray(layer.held_out.second_moment, np.float64)
            size = lambda w, h=h: np.sqrt(np.sum(w * (h @ w)))
            yield found | {
                "seconds": time.perf_counter() - start,
                "bits": 8 * stored.nbytes / layer.w.size,
                "weight": float(np.linalg.norm(delta) / np.linalg.norm(layer.w)),
                "output": float(size(delta) / size(layer.w.astype(np.float64))),
            }


def method_times(quick: bool, packages: list[str], status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: seconds to quantize a layer of 1024 x 1024 by each method, at first, with compiling, and again.

    Qwix's GPTQ, which loops over the columns in Python, is left out, as in `errors`.
    """
    side = 256 if quick else 1024
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape, np.float32) for shape in ((side, side), (2 * side, side)))
    stats = jw.capture(lambda params, x: x @ params["kernel"], {"kernel": jnp.asarray(w)}, [jnp.asarray(x)])["kernel"]
    jax.block_until_ready(stats)
    for way in ways(packages, quick):
        if way.format != INT4 or way[:2] == ("Qwix", "GPTQ"):
            continue
        status(f"time: {way.package}, {way.method}")
        found: dict[str, Any] = {"package": way.package, "method": way.method, "format": way.format, "side": side}
        for key in ("first_seconds", "seconds"):
            start = time.perf_counter()
            way.store(w, stats)
            found[key] = time.perf_counter() - start
        yield found


def times(quick: bool, packages: list[str], effort: Effort, status: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Yields rows: time to quantize by rounding, and time of x @ w over that of the package's float product."""
    side = 256 if quick else SIDE
    rng = np.random.default_rng(0)
    w = rng.standard_normal((side, side), np.float32)
    for way in ways(packages, quick):
        if way.method != "round to nearest":
            continue
        status(f"time: {way.package}, {way.format}")
        found: dict[str, Any] = {"package": way.package, "format": way.format, "products": {}}
        stored = way.store(w, InputStats())
        start = time.perf_counter()
        stored = way.store(w, InputStats())
        found["quantize_ms"] = (time.perf_counter() - start) * 1e3
        for rows in ROWS if stored.times else ():
            x = rng.standard_normal((rows, side), np.float32)
            try:
                result = compare(stored.times(x), floats(way.package, x, w), effort)
            except (NotImplementedError, RuntimeError, AssertionError) as e:
                found["fails"] = f"{type(e).__name__}: {e}"[:120]
                continue
            ratio = dataclasses.asdict(result.ratio)
            found["products"][str(rows)] = {"ratio": ratio, "ms": result.ours.median * 1e3}
        yield found


def floats(package: str, x: np.ndarray, w: np.ndarray) -> Program:
    """x @ w in float32 by JAX or, for torchao, by torch."""
    if package != "torchao":
        return function(jnp.matmul, jnp.asarray(x), jnp.asarray(w))
    import torch

    inputs, weight = torch.from_numpy(x), torch.from_numpy(w.T.copy())

    def run(n: int) -> None:
        for _ in range(n):
            torch.nn.functional.linear(inputs, weight)

    return run
