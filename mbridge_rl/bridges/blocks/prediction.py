"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): layers after the last decoder layer that predict the tokens after the
next.

A prediction layer is an ordinary layer after `eh_proj [hidden, 2 * hidden]`, which takes the normalised embedding of the next
token and the normalised output of the layer before. It shares the model's embedding and output layer; checkpoints hold copies
of them under the prediction layer's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule, column_parallel, replicated, vocabulary_parallel

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def with_prediction(hf: ConfigReader, spec: ModelSpec, blocks: Sequence[Block]) -> ModelSpec:
    """`spec` for checkpoints with prediction layers: it ignores these layers, and its `prediction` is the same model with them.

    Args:
        blocks: the blocks of the ordinary layer in a prediction layer; Megatron builds it like the model's last layer.
    """
    count = hf.undeclared("num_mtp_layers") or hf.undeclared("num_nextn_predict_layers") or 0
    if not count:
        return spec
    names = [HF_LAYER.format(layer=hf.num_hidden_layers + index) for index in range(count)]
    prediction = None if spec.tied_embeddings else _predicting(spec, names, blocks)
    ignored = (*spec.ignored_hf_prefixes, *(f"{name}." for name in names))
    return replace(spec, ignored_hf_prefixes=ignored, prediction=prediction)


def _predicting(spec: ModelSpec, names: Sequence[str], blocks: Sequence[Block]) -> ModelSpec:
    embedding = next(rule for rule in spec.rules if rule.megatron_name == _EMBEDDING)
    final_norm = next(rule for rule in spec.rules if rule.megatron_name == "decoder.final_layernorm.weight")
    rules = [
        # Megatron's final norm moves to the stage of the last decoder layer, whose output the prediction layers take.
        *(replace(rule, placement="last_layer_stage") if rule is final_norm else rule for rule in spec.rules),
        *(rule for index, name in enumerate(names) for rule in _prediction_layer(spec, index, name, blocks)),
        replace(embedding, placement="prediction_stage_copy"),
    ]
    return replace(spec, rules=tuple(rules), transformer_config={**spec.transformer_config, "mtp_num_layers": len(names)})


def _prediction_layer(spec: ModelSpec, index: int, hf_prefix: str, blocks: Sequence[Block]) -> Iterator[Rule]:
    h, megatron_prefix = spec.transformer_config["hidden_size"], f"mtp.layers.{index}"
    vocab = (spec.vocab_size, h)
    repeated = vocabulary_parallel(_EMBEDDING, f"{hf_prefix}.embed_tokens.weight", vocab, placement="first_stage")
    yield replace(repeated, repeats=True)
    own = [
        replicated(f"{megatron_prefix}.enorm.weight", f"{hf_prefix}.enorm.weight", (h,)),
        replicated(f"{megatron_prefix}.hnorm.weight", f"{hf_prefix}.hnorm.weight", (h,)),
        column_parallel(f"{megatron_prefix}.eh_proj.weight", {f"{hf_prefix}.eh_proj.weight": h}, (2 * h,)),
        *(_moved(rule, f"{megatron_prefix}.transformer_layer", hf_prefix) for block in blocks for rule in block.rules),
        replicated(f"{megatron_prefix}.final_layernorm.weight", f"{hf_prefix}.shared_head.norm.weight", (h,)),
    ]
    yield from (replace(rule, placement="prediction_stage", layers=None) for rule in own)
    repeated = vocabulary_parallel(_OUTPUT, f"{hf_prefix}.shared_head.head.weight", vocab, placement="last_stage")
    yield replace(repeated, repeats=True)


def _moved(rule: Rule, megatron_prefix: str, hf_prefix: str) -> Rule:
    """The rule of an ordinary layer, changed to the names of a prediction layer."""
    parts = tuple(replace(part, hf_name=part.hf_name.replace(HF_LAYER, hf_prefix)) for part in rule.parts)
    return replace(rule, megatron_name=rule.megatron_name.replace(MEGATRON_LAYER, megatron_prefix), parts=parts)
