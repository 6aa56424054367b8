"""The components of a policy-gradient step, one per file, as pure functions of tensors without a model or a process group.

Per-token tensors are `[batch, seq]` fp32; `mask [batch, seq]` bool marks the tokens that are trained on.
"""
