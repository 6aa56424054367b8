"""The commands that work on models, layouts and checkpoints: one file each, registered in `mbridge_rl.cli`. They import
anything below them, and only when they run.
"""
