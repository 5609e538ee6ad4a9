"""Units that several weights have in common: found in a model, scored, masked, and removed from all of them."""

from jaxweights.models.units import mask_units, remove_units, unit_norms
from jaxweights.programs.units.groups import UnitGroup, UnitSlot
from jaxweights.programs.units.inference import unit_groups

__all__ = [
    "UnitGroup",
    "UnitSlot",
    "mask_units",
    "remove_units",
    "unit_groups",
    "unit_norms",
]
