"""One-shot pruning with statistics of the inputs of each layer."""
