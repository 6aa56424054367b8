"""Architectures that have no bridge here, and why: named to whoever asks for one, and listed in docs/models.md."""

UNSUPPORTED: dict[str, str] = {
    "KimiLinearForCausalLM": "Kimi delta attention has no counterpart in Megatron-core 0.16",
    "NemotronH_Nano_VL_V2": (
        "Transformers has no class for it: its config and its vision tower are code of the checkpoint's repository. Its "
        "language model is a NemotronHForCausalLM: make a directory of its llm_config and its tensors of language_model"
    ),
}
