"""The options of `sync.weight_sync.WeightSync`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.quantize import Fp8
from mbridge_rl.core.typed_values import AtLeastZero, Bytes, Seconds, range_problems
from mbridge_rl.sync.store.weight_store import WeightStore

DEFAULT_BUCKET_BYTES = 32 << 20

TransportName = Literal["auto", "shared_memory", "process_group", "files", "cuda_ipc"]


@dataclass(frozen=True)
class SyncOptions:
    """The options of a sync.

    Attributes:
        mode: `staged` keeps the old version serving until the commit and needs memory for two more versions per host;
            `streaming` needs a few buckets, holds generation for the whole transfer, and loses the old version if it fails.
        transport: `auto` takes shared memory if trainer and engines share a host, else a process group.
        bucket_bytes: bytes of one bucket; larger tensors travel in chunks.
        verify: compute digests on both ends and compare them before the commit.
        nonfinite: whether NaN and infinite weights are refused, before anything that is served changes, or passed on.
        requests: what happens to requests in flight at the commit (`sync.vllm.engines.requests.RequestRunner.hold`).
        retries: number of further attempts after one that timed out or arrived with other bytes.
        timeout: seconds, for every single wait.
        store: name of the weight store; a named store outlives the trainer. `None` makes one that ends with it.
        url: the directory or object store in which the transport `files` puts its files.
        lost_engines: `raise` fails a sync whose engine died before the commit; `drop` goes on with the others, as long as
            there are any.
        delta: send only the changes since the last committed version, compressed, if the engines have that version and the
            changes are smaller than everything (`sync.payload.delta`). The trainer then keeps a packed copy of what it sends in
            host memory; in mode `staged` on one host, the workers keep the images, as those on other hosts do.
        quantization: send the weights of linears in fp8 with scales, which the trainer makes; the engine runs that format.
    """

    mode: Mode = "staged"
    transport: TransportName = "auto"
    bucket_bytes: Bytes = DEFAULT_BUCKET_BYTES
    verify: bool = True
    nonfinite: Literal["refuse", "pass"] = "refuse"
    requests: InFlight = "keep"
    retries: AtLeastZero = 1
    timeout: Seconds = 120.0
    store: str | None = None
    url: str | None = None
    lost_engines: Literal["raise", "drop"] = "raise"
    delta: bool = False
    quantization: Fp8 | None = None

    def __post_init__(self) -> None:
        wrong = {
            "delta=True needs verify=True: digests prove what a delta starts from and leads to": self.delta and not self.verify,
            "transport='files' needs url, a directory or an object store that both ends reach": (
                self.transport == "files" and not self.url
            ),
        }
        if problems := range_problems(self) + [text for text, is_so in wrong.items() if is_so]:
            raise SyncError("; ".join(problems))
        if self.store is not None:
            WeightStore(self.store)  # raises if the name is not possible


InFlight = Literal["keep", "wait", "abort"]


Mode = Literal["staged", "streaming"]
