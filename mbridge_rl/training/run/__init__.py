"""A run from its recipe: reads and checks the recipe, starts ranks and engines, restarts them after failures, and writes the
run folder. Everything else in `training` works without this folder.
"""
