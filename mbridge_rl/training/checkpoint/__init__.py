"""Training checkpoints: weights, the optimizer's state and random states, which any other layout can load."""
