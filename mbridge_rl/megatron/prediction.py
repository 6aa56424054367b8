"""Models with multi-token-prediction layers. Forward passes without labels, as in all of RL, skip these layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from mbridge_rl.core.extras import Extra
from mbridge_rl.megatron.layer_specs import change_layer_specs
from mbridge_rl.megatron.versions.layer_specs import keep_query_projection


def predicting_model(layers: Any, extras: Sequence[Extra], vp_stage: int | None, arguments: Mapping[str, Any]) -> nn.Module:
    """A `GPTModel` with prediction layers where the config's pipeline layout puts them, frozen.

    Frozen parameters need no gradients: DDP does not wait for them, and the optimizer does not change them.

    Args:
        layers: Megatron's spec of this chunk's decoder layers.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = arguments["config"]
    # The spec of the model's last layer, which may be in another chunk.
    last = get_gpt_decoder_layer_specs(config, use_transformer_engine=True, normalization=config.normalization)[-1:]
    keep_query_projection(last, config)
    change_layer_specs(last, extras)
    prediction = get_gpt_mtp_block_spec(
        config, TransformerBlockSubmodules(layer_specs=last), use_transformer_engine=True, vp_stage=vp_stage
    )
    model = _skipping_class()(transformer_layer_spec=layers, mtp_block_spec=prediction, vp_stage=vp_stage, **arguments)
    if model.mtp_process:
        model.mtp.requires_grad_(False)
    return model


@cache
def _skipping_class() -> type[nn.Module]:
    from megatron.core.models.gpt import GPTModel

    class SkippingModel(GPTModel):
        """Megatron's model, but without labels it skips the prediction layers, where Megatron's own fails."""

        def _postprocess(self, hidden_states: Tensor, *arguments: Any, labels: Tensor | None = None, **options: Any) -> Tensor:
            if labels is not None:
                return super()._postprocess(hidden_states, *arguments, labels=labels, **options)
            with_prediction = self.config
            self.config = copy.copy(with_prediction)
            self.config.mtp_num_layers = None
            try:
                options["mtp_in_postprocess"] = False
                return super()._postprocess(hidden_states, *arguments, labels=None, **options)
            finally:
                self.config = with_prediction

    return SkippingModel
