"""The ten techniques, one room each. They know arrays and nothing of trees, optax or Flax."""
