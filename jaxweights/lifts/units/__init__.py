"""Units that several weights share: found in a model, scored, masked, and removed from all of them."""

from jaxweights.lifts.units.groups import UnitGroup, UnitSlot
from jaxweights.lifts.units.inference import unit_groups
from jaxweights.lifts.units.removal import mask_units, remove_units, unit_norms

__all__ = ["UnitGroup", "UnitSlot", "mask_units", "remove_units", "unit_groups", "unit_norms"]
