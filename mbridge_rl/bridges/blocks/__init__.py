"""What the model families share, block by block: attention, experts, latent attention, Mamba, delta nets, prediction layers,
rotary positions and vision towers. A block holds both halves of a bridge: Megatron config fields and mapping rules. Blocks
import `core` only; families import blocks.
"""
