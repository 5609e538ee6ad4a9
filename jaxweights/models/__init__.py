"""What is done to a whole model: statistics of its inputs, initialization, folding, units, tables and pictures."""
