"""Architectures that have no bridge, with the reasons, for error messages and for docs/models.md."""

_INDEXER = "every token attends to those that an indexer chooses (DeepSeek sparse attention), which no block here maps"

UNSUPPORTED: dict[str, str] = {
    "DeepseekV32ForCausalLM": _INDEXER,
    "GlmMoeDsaForCausalLM": _INDEXER,
    "Llama4ForConditionalGeneration": "most of its layers attend within chunks, which Megatron-core 0.16's attention cannot",
    "Mistral3ForConditionalGeneration": (
        "its vision tower has no bridge. Its language model is a MistralForCausalLM or a Ministral3ForCausalLM: make a "
        "directory of its text_config and its tensors of language_model"
    ),
    "KimiLinearForCausalLM": "Kimi delta attention has no counterpart in Megatron-core 0.16",
    "NemotronH_Nano_VL_V2": (
        "Transformers has no class for it: its config and its vision tower are code of the checkpoint's repository. Its "
        "language model is a NemotronHForCausalLM: make a directory of its llm_config and its tensors of language_model"
    ),
}
