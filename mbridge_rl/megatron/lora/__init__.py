"""LoRA on Megatron's layers: which linears are adapted, the adapted layers themselves, how they start, dropout, and the live
adapters as a side of a plan. Imports `core` and the rest of `megatron`.
"""
