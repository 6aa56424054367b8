"""Blocks that model families share: attention, experts, latent attention, Mamba, delta nets, prediction layers, rotary
positions and vision towers. A block contains both halves of a bridge: Megatron config fields and mapping rules. Blocks import
`core` only; families import blocks.
"""
