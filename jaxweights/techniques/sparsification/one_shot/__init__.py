"""Pruning in one shot, with statistics of the inputs of each layer."""
