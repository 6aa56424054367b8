"""An engine for a trainer around a `vllm serve` that somebody started, on this or another host, over HTTP.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "mbridge"}' \\
        --worker-extension-cls mbridge_rl.sync.vllm.extension.WorkerExtension \\
        --enable-scale-out --logprobs-mode processed_logprobs

The control plane is vLLM's own routes for RL (`vllm/entrypoints/rl/online/api_router.py`) and its `/collective_rpc`, which it
serves only in its developer mode. `generate` uses its route for tokens in and out, which vLLM calls scale-out. The weights
themselves travel by any transport that both ends share.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, overload

from mbridge_rl.bounded_http import Answer, request
from mbridge_rl.core.errors import EngineProcessError, SyncError, TransferTimeout, listed
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.typed_values import read_fields
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.adapter_messages import AdapterModule, AdapterUpdate
from mbridge_rl.sync.vllm.engines.attached import AttachedEngine
from mbridge_rl.sync.vllm.engines.completions import Completion, completion
from mbridge_rl.sync.vllm.engines.server_answers import Choice, Choices, Models, Results, Success, WeightInfo, WorldSize
from mbridge_rl.sync.vllm.lora.adaptable_engine import Served
from mbridge_rl.sync.vllm.lora.adapter_slots import PLACEHOLDER, in_slots

T = TypeVar("T")

_RETRY_SECONDS = 0.05  # between attempts of a request that is refused while generation is paused
_SHOWN = 500  # characters of an error's body
_NEEDED = {
    "/inference/v1/generate": "--enable-scale-out",
    "/v1/load_lora_adapter": "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}
_MOST_BYTES = 1 << 30  # the largest answer that is read; workers may describe all their tensors in one


class _Paused(SyncError):
    """The server refused a request because generation is paused."""


class ServerEngine(AttachedEngine):
    """Connects to a server by its URL.

    Args:
        url: the URL, such as "http://10.0.0.7:8000".
        weight_version: the version of the weights that it was started with.
        call_timeout: seconds until a call must be answered.
        api_key: the key that the server was started with (`--api-key`).
        connections: number of requests for completions that are open at once.

    Raises:
        EngineProcessError: there is no answer at the URL. SyncError: the server was started without the settings above.
    """

    def __init__(
        self,
        url: str,
        *,
        weight_version: int = 0,
        call_timeout: float = 600.0,
        api_key: str | None = None,
        connections: int = 64,
    ) -> None:
        self._url, self._call_timeout = url.rstrip("/"), call_timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="mbridge-server")
        self._attach(weight_version)

    def __str__(self) -> str:
        return f"the server {self._url}"

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _completions(
        self, prompts: list[list[int]], fields: list[dict[str, Any]], adapters: Sequence[Served | None]
    ) -> list[Completion]:
        version = self.weight_version

        def answer(index: int) -> list[Completion]:
            adapter = adapters[index]
            body = {"token_ids": prompts[index], "sampling_params": fields[index], "model": adapter and adapter.name}
            choices = self._generated(body).choices
            return [_completion(index, choice, version) for choice in sorted(choices, key=lambda choice: choice.index)]

        return [sample for samples in self._pool.map(answer, range(len(prompts))) for sample in samples]

    def _generated(self, body: dict[str, Any]) -> Choices:
        """The answer to a request for tokens. While generation is paused, vLLM refuses requests since 0.33; they are made
        again."""
        deadline = time.monotonic() + self._call_timeout
        while True:
            try:
                return self._post("/inference/v1/generate", body, Choices)
            except _Paused:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def _sizes(self) -> tuple[int, int]:
        paths = ("/get_world_size?include_dp=false", "/get_world_size")
        of_one_engine, of_all_engines = (self._get(path, WorldSize).world_size for path in paths)
        return of_one_engine, of_all_engines

    def _rpc(self, method: str, args: list[Any]) -> list[Any]:
        return self._post("/collective_rpc", {"method": method, "args": args}, Results).results

    def _halt(self, requests: InFlight, timeout: float) -> None:
        try:
            self._post(f"/pause?mode={requests}&clear_cache=true", {}, timeout=timeout)
        except TransferTimeout as error:
            self._go_on()
            raise TransferTimeout(f"requests did not finish within {timeout:g} s; use 'keep' or 'abort'") from error

    def _go_on(self) -> None:
        self._post("/resume", {})

    def _label(self) -> str:
        return self._get("/weight_info", WeightInfo).weight_version

    def _set_label(self, label: str) -> None:
        self._post("/update_weight_version", {"new_version": label})

    def _reset_caches(self) -> bool:
        return self._post("/reset_prefix_cache?reset_running_requests=true", {}, Success).success

    def _claim_slot(self, name: str, update: AdapterUpdate, served: Mapping[str, Served]) -> int:
        """Lets the server load an adapter that changes nothing, because it only knows adapters from files; the server chooses
        its number.

        Raises:
            SyncError: the owner has an adapter of this name, or loads one at this moment.
        """
        known = {model.id: str(model.root) for model in self._get("/v1/models", Models).data}
        if name in known and PLACEHOLDER not in known[name]:
            raise SyncError(f"{self} has loaded an adapter {name!r} from {known[name]}: give this one another name")
        if name in known:  # an earlier trainer died after it had loaded the adapter
            slot_id = self._load(name, update, load_inplace=True)[-1]
            self._release_slot(name)
            self._call_workers(in_slots, "remove", slot_id)
        before = self._slot_ids()
        *others, newest = self._load(name, update)
        if newest in before or not set(others) <= set(before):
            self._release_slot(name)
            raise SyncError(f"{self} loaded other adapters while {name!r} was loaded: try again")
        return newest

    def _load(self, name: str, update: AdapterUpdate, **options: bool) -> list[int]:
        """Loads an adapter without effect. Returns all slot ids; that of the loaded adapter comes last."""
        paths = self._call_workers(in_slots, "write_without_effect", _first_module(update))  # on the host of the workers
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": paths[0], **options})
        finally:
            self._call_workers(in_slots, "discard_files")
        return self._slot_ids()

    def _release_slot(self, name: str) -> None:
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _slot_ids(self) -> list[int]:
        return self._call_workers(in_slots, "slot_ids")[0]

    def _get(self, path: str, cls: type[T]) -> T:
        return self._read(path, self._ask(path, None, self._call_timeout), cls)

    @overload
    def _post(self, path: str, body: dict[str, Any], cls: type[T]) -> T: ...
    @overload
    def _post(self, path: str, body: dict[str, Any], *, timeout: float | None = None) -> None: ...
    def _post(self, path: str, body: dict[str, Any], cls: type[T] | None = None, *, timeout: float | None = None) -> T | None:
        answer = self._ask(path, json.dumps(body).encode(), self._call_timeout if timeout is None else timeout)
        return None if cls is None else self._read(path, answer, cls)

    def _read(self, path: str, answer: Answer, cls: type[T]) -> T:
        """The server's answer, read as `cls`; other fields are ignored.

        Raises:
            SyncError: the answer is not like that; names every wrong field.
        """
        problems: list[str] = []
        try:
            result = read_fields(cls, parse_json(answer.body, most_bytes=_MOST_BYTES), problems, others="ignore")
        except JSONTextError as error:
            raise SyncError(f"{self} answered {path}, but the answer cannot be read: {error}") from error
        if result is None:
            raise SyncError(f"{self} answered {path}, but not as vLLM does: {listed(problems)}")
        return result

    def _ask(self, path: str, body: bytes | None, timeout: float) -> Answer:
        try:  # without proxies, which are not meant for engines
            answer = request(self._url + path, body, self._headers, seconds=timeout, most_bytes=_MOST_BYTES, use_proxies=False)
        except TimeoutError as error:
            raise TransferTimeout(f"{self} did not answer {path} within {timeout:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, cut short, no HTTP, no URL
            raise EngineProcessError(f"{self} cannot be reached for {path}: {error}") from error
        if answer.status >= 300:
            raise self._refused(path, answer)
        return answer

    def _refused(self, path: str, answer: Answer) -> Exception:
        body = answer.body.decode(errors="replace")[:_SHOWN]
        if answer.status == 404 and '"error"' not in body:  # vLLM's own refusals have an "error"
            needed = _NEEDED.get(path, "VLLM_SERVER_DEV_MODE=1")
            return SyncError(f"{self} has no {path}: start it with {needed}, or vLLM does not serve this route")
        if answer.status == 503 and "ServiceUnavailable" in body:
            return _Paused(f"{self} refuses requests while generation is paused: {body}")
        if "EngineDead" in body:
            return EngineProcessError(f"the engine of {self} died: {body}")
        return SyncError(f"{self} answered {path} with status {answer.status}: {body}")


def _completion(prompt_index: int, choice: Choice, version: int) -> Completion:
    logprobs = [entry.logprob for entry in (choice.logprobs and choice.logprobs.content) or []]
    spans = [(span.version, span.start, span.end) for span in choice.weight_versions or []]
    return completion(prompt_index, choice.token_ids, logprobs, str(choice.finish_reason), spans, version)


def _first_module(update: AdapterUpdate) -> AdapterModule:
    """The two factors of an update's first module."""
    module = update.tensors[0].hf_name.rpartition(".lora_")[0]
    return AdapterModule(tuple(tensor for tensor in update.tensors if tensor.hf_name.startswith(f"{module}.lora_")))
