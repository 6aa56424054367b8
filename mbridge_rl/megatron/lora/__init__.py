"""LoRA on Megatron's layers: `attach` chooses the linears that are adapted, `layers` has the adapted layers, `start` their
first values, `dropout` their dropout, and `adapter_side` describes the live adapters as a side of a plan. This folder imports
`core` and the rest of `megatron`.
"""
