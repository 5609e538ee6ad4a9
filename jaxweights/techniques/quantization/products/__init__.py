"""Products with stored weights, one implementation for each kind of device."""
