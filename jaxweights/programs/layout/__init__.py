"""How a program reads its weights, followed in abstract values: nothing is computed."""
