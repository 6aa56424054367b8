"""From prompts to rewarded episodes: `episodes` has episodes and environments, `generator` keeps engines busy, `rewards` has
problems and rewards, and `batches` makes the batches that the trainer takes.
"""
