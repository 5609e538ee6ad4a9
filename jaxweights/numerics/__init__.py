"""Numerical building blocks that the techniques share."""
