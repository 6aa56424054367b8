"""The commands that work on models, layouts and checkpoints: one file each, registered in `mbridge_rl.cli`. They may import
anything below them, and import it only when they run.
"""
