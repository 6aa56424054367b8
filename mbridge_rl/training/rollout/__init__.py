"""From prompts to rewarded episodes: episodes and environments, the generator that keeps engines busy, problems, rewards, and
the batches that the trainer takes.
"""
