"""Statistics of what layers are fed, as `capture` returns them."""

from jaxweights.core.calibration import InputStats

__all__ = [
    "InputStats",
]
