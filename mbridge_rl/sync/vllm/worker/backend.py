"""The weight-transfer backend "mbridge": the engine that vLLM makes in each worker, which holds our receiver.

Weights reach it only by planned syncs (`worker.calls`, `sync.worker.payload_receiver`); it refuses vLLM's own calls of
an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from mbridge_rl.core.errors import SyncError
from mbridge_rl.sync.vllm.worker.receiver import Receiver

_PLANNED_ONLY = "the backend 'mbridge' takes weights by planned syncs (mbridge_rl.WeightSync), not by vLLM's own update calls"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """An empty message, because this backend meets a trainer by `worker.calls.describe`."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """An empty message, because this backend takes no weights by vLLM's `update_weights`."""


class PlannedSyncEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's weight-transfer engine; its `receiver` does the work."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = Receiver(model, vllm_config)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        raise SyncError(_PLANNED_ONLY)

    def start_weight_update(self) -> None:
        raise SyncError(_PLANNED_ONLY)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        raise SyncError(_PLANNED_ONLY)

    def finish_weight_update(self) -> None:
        raise SyncError(_PLANNED_ONLY)

    def shutdown(self) -> None:
        self.receiver.payload.close()
