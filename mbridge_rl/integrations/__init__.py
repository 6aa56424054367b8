"""Adapters for RL frameworks, each a thin layer over `AutoBridge` and `sync`.

`mbridge` and `megatron_bridge` have the interfaces of the packages of these names, `verl` is a checkpoint engine, `nemo_rl` a
weight synchronizer. docs/integrations.md shows how they are used.
"""
