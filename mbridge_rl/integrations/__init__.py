"""The interfaces that other frameworks embed, each a thin layer over `AutoBridge` and `sync`.

`mbridge` and `megatron_bridge` replace the packages of these names, `verl` is a checkpoint engine, `nemo_rl` is a weight
synchronizer, and `vllm_source` feeds vLLM's own weight-transfer backends. docs/integrations.md shows how to use them.
"""
