"""What the model families share, block by block: attention, experts, latent attention, Mamba, delta nets, prediction layers,
rotary positions and vision towers. A block is both halves of a bridge at once: Megatron config fields and mapping rules.
Blocks import `core` only; families import blocks.
"""
