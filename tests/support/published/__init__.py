"""Published configs, made small: what they are made with, and the random checkpoints that tests make of them."""
