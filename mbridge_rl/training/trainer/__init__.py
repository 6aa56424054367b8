"""The Megatron trainer: turns a batch and a loss into updated weights, over every parallel axis."""
