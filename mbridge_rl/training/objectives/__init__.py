"""The components of a policy-gradient step, one idea per file, as pure functions of tensors: no model, no process group.

Per-token tensors are `[batch, seq]` fp32; `mask [batch, seq]` bool marks the tokens that count.
"""
