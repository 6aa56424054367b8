"""Stands for NeMo-RL, which is no package of an index."""
