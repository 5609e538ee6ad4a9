"""64-bit floats for the length of a test, under the name that the installed JAX has for it."""

import jax


def enable_x64(on: bool = True):
    """A context in which arrays may have 64 bits."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64 as older

    return older(on)
