"""Scalings that leave a program as it is: of units, in the weights that make them and in those that read them."""
