"""Seconds until the first step: python benchmarks/startup.py [--quick] [--before DIRECTORY].

Compilation of `confine` with `Prune` and `Regrow` on 48 kernels of three shapes, and eager initialization of a ResNet18
around which weights are clipped or spectrally normalized. Each case has a process of its own, without a compilation
cache. `--before` names another checkout, such as a git worktree of an older commit, to measure in alternation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CASES = (
    *(f"confine({transform}): {what}" for transform in ("Prune", "Regrow") for what in ("init", "step")),
    *(f"ResNet18 with {transform}: eager init" for transform in ("ClipWeights", "SpectralNorm")),
)
KERNELS = {"query": (512, 512), "up": (512, 2048), "down": (2048, 512)}


def compilation(case: str, n_layers: int) -> Callable[[], Any]:
    """Returns the compilation of `confine` on 3·n_layers kernels, of its init or of one step."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxweights as jw

    prune = jw.Prune(0.9, score=jw.scores.random, distribution=jw.pruning.ErdosRenyi())
    tx = jw.confine(optax.sgd(0.1, momentum=0.9), jw.Regrow(prune) if "Regrow" in case else prune)
    layer = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in KERNELS.items()}
    params = {f"layer_{i}": layer for i in range(n_layers)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if case.endswith("init"):
        return lambda: jax.jit(tx.init).lower(params).compile()
    state = jax.eval_shape(tx.init, params)
    return lambda: jax.jit(step).lower(params, state, params).compile()


def initialization(case: str, n_blocks: int) -> Callable[[], Any]:
    """Returns the eager initialization of a residual network of 2·n_blocks blocks, 18 layers if n_blocks is 4."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    import jaxweights as jw

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            def convolution(x, n, window, strides=1):
                x = nn.Conv(n, (window, window), strides, use_bias=False)(x)
                return nn.BatchNorm(use_running_average=True)(x)

            x = nn.relu(convolution(x, 64, 7, 2))
            for i in range(2 * n_blocks):
                n, strides = 64 * 2 ** (i // 2), 2 if i % 2 == 0 and i > 0 else 1
                y = convolution(nn.relu(convolution(x, n, 3, strides)), n, 3)
                x = nn.relu(y + (x if x.shape == y.shape else convolution(x, n, 1, strides)))
            return nn.Dense(10)(x.mean((1, 2)))

    model, x = ResNet(), jnp.ones((1, 32, 32, 3))
    jax.block_until_ready(model.init(jax.random.key(0), x))  # what the model itself needs is not counted
    wrapped = jw.linen.Transformed(model, jw.SpectralNorm() if "SpectralNorm" in case else jw.ClipWeights(1.0))
    return lambda: jax.block_until_ready(wrapped.init(jax.random.key(0), x))


def measure(case: str, size: int) -> dict[str, float]:
    """Returns the seconds that a case takes, by the clock and of CPU time."""
    run = (initialization if case.startswith("ResNet") else compilation)(case, size)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def in_new_process(checkout: Path, case: str, quick: bool) -> dict[str, float]:
    """Runs `measure` in a process that imports the library from `checkout`."""
    size = (1 if quick else 4) if case.startswith("ResNet") else (1 if quick else 16)
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--measure", case, str(size)]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    from rich.table import Table
    from script import environment, parser, terminal

    options = parser(__doc__)
    options.add_argument("--before", type=Path, help="another checkout of the library, measured in turn")
    options.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.measure is not None:
        case, size = options.measure
        print(json.dumps(measure(case, int(size))))
        return
    checkouts = {"now": ROOT} | ({"before": options.before} if options.before else {})
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in checkouts}
    table = Table(title="seconds by the clock (of CPU time)")
    for heading in ("case", *checkouts):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in CASES:
        for name, checkout in checkouts.items():
            results[name][case] = in_new_process(checkout, case, options.quick)
        found = [results[name][case] for name in checkouts]
        table.add_row(case, *(f"{r['seconds']:.1f} ({r['cpu_seconds']:.1f})" for r in found))
    terminal().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"command": "python benchmarks/startup.py", "quick": options.quick, "environment": environment()}
    path = options.out / f"startup{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
