"""The command `jaxweights`."""
