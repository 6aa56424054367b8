"""The Megatron trainer: from a batch and a loss to updated weights, over every parallel axis."""
