"""Enables 64-bit floats within a test, on any supported JAX."""

import jax


def enable_x64(on: bool = True):
    """Context manager that enables 64-bit types."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64 as older

    return older(on)
