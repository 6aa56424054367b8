"""Training checkpoints: weights, the optimizer's state and random states. A trainer of any other layout can load them."""
