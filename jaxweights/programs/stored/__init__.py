"""Programs run on stored weights: products from what is stored, all else on the weight as an array."""
