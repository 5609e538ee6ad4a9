"""Whole-model tools for NNX."""
