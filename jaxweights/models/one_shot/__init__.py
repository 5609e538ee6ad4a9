"""One-shot methods on whole models."""
