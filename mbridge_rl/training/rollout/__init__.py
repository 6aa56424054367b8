"""Sampling of rewarded episodes: problems, episodes and environments, the generator that keeps engines busy, rewards, and the
batches that the trainer takes.
"""
