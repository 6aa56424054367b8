"""A whole run from its configuration: the recipe, its checks, the start and restart of ranks and engines, and the files of a
run folder. Everything else in `training` works without it.
"""
