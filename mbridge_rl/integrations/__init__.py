"""The ends that RL frameworks embed, each a thin layer over `AutoBridge` and the sync plane.

`mbridge` and `megatron_bridge` stand in for the packages of these names, `verl` is a checkpoint engine, `nemo_rl` a weight
synchronizer. docs/integrations.md shows how.
"""
