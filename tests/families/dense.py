"""Dense decoders."""

from families.family import Family

FAMILIES = [
    Family("Llama 2, 3, 3.1, 3.2, 3.3", "llama", "llama", "LlamaForCausalLM", {"head_dim": 32}),
    Family("Qwen3", "qwen3", "qwen3", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
]
