"""Layers: the products of a weight and an activation that a traced program computes."""
