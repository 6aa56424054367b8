"""A run from its configuration: the recipe, its checks, how ranks and engines are started and started again, and what a run
folder receives. Everything else in `training` works without it.
"""
