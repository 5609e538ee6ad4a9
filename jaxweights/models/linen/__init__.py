"""Whole-model tools for Linen."""
