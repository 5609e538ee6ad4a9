"""What everything else speaks: weights and their axes, the protocol of a transform, stored weights, checks."""
