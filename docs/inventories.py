"""What these pages link to in the documentation of JAX, Flax and optax.

Sphinx would fetch the list of all their pages from the network. These few stand in for it, so a build needs none.
"""

import zlib
from pathlib import Path

PACKAGES = {
    "jax": (
        "https://docs.jax.dev/en/latest/",
        {
            **{
                f"jax.{name}": f"_autosummary/jax.{name}.html#jax.{name}"
                for name in (
                    *("Array", "ShapeDtypeStruct", "checkpoint", "eval_shape", "grad", "jit", "shard_map", "vmap"),
                    *("lax.scan", "nn.relu", "random.key", "tree.map"),
                )
            },
        },
    ),
    "flax": (
        "https://flax.readthedocs.io/en/latest/",
        {
            **{
                f"flax.linen.{name}": f"api_reference/flax.linen/{page}.html#flax.linen.{name}"
                for name, page in {
                    "BatchNorm": "layers",
                    "Dense": "layers",
                    "LayerNorm": "layers",
                    "SpectralNorm": "layers",
                    "WeightNorm": "layers",
                    "scan": "transformations",
                }.items()
            },
            **{
                f"flax.nnx.{name}": f"api_reference/flax.nnx/{page}.html#flax.nnx.{name}"
                for name, page in {
                    "Linear": "nn/linear",
                    "Param": "variables",
                    "Optimizer": "training/optimizer",
                }.items()
            },
        },
    ),
    "optax": (
        "https://optax.readthedocs.io/en/latest/",
        {
            f"optax.{name}": f"api/{page}.html#optax.{name}"
            for name, page in {
                "adam": "optimizers",
                "adamw": "optimizers",
                "sgd": "optimizers",
                "chain": "combining_optimizers",
                "masked": "optimizer_wrappers",
                "apply_updates": "apply_updates",
                "add_decayed_weights": "transformations",
                "scale_by_adam": "transformations",
                "cosine_decay_schedule": "optimizer_schedules",
                "linear_schedule": "optimizer_schedules",
                "polynomial_schedule": "optimizer_schedules",
                "inject_hyperparams": "optimizer_schedules",
            }.items()
        },
    ),
}
CLASSES = {
    "Array",
    "ShapeDtypeStruct",
    "BatchNorm",
    "Dense",
    "LayerNorm",
    "SpectralNorm",
    "WeightNorm",
    "Linear",
    "Param",
}


def mapping(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes an inventory for each package; returns what `intersphinx_mapping` expects."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, (_, names) in PACKAGES.items():
        role = lambda name: "class" if name.rpartition(".")[2] in CLASSES else "function"
        lines = "".join(f"{name} py:{role(name)} 1 {place} -\n" for name, place in names.items())
        head = f"# Sphinx inventory version 2\n# Project: {package}\n# Version:\n# Content, compressed by zlib:\n"
        (folder / f"{package}.inv").write_bytes(head.encode() + zlib.compress(lines.encode()))
    return {package: (address, str(folder / f"{package}.inv")) for package, (address, _) in PACKAGES.items()}
