"""The NNX level: any module with its weights transformed, and the norms as modules."""
