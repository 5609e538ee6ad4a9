"""Reading a traced program: what it does with its weights, whatever library the model is written in."""
