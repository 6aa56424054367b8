"""A `vllm serve` that somebody started, on this or another host, as an engine that a trainer syncs over HTTP.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "mbridge"}' \\
        --worker-extension-cls mbridge_rl.sync.vllm.extension.WorkerExtension \\
        --enable-scale-out --logprobs-mode processed_logprobs

The control plane is vLLM's own routes for RL (`vllm/entrypoints/rl/online/api_router.py`) and its `/collective_rpc`, all of
which it serves in its developer mode only. `generate` takes its route for tokens in and out, which it calls scale-out. The
weights themselves take whatever transport both ends share.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, overload

from mbridge_rl.bounded_http import Answer, request
from mbridge_rl.core.errors import EngineProcessError, SyncError, TransferTimeout, listed
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.typed_values import read_fields
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.vllm.engines.attached import AttachedEngine
from mbridge_rl.sync.vllm.engines.completions import Completion, completion
from mbridge_rl.sync.vllm.engines.server_answers import Choice, Choices, Models, Results, Success, WeightInfo, WorldSize
from mbridge_rl.sync.vllm.lora.adaptable_engine import Served
from mbridge_rl.sync.vllm.lora.adapter_slots import PLACEHOLDER, in_slots

T = TypeVar("T")

_SHOWN = 500  # characters of an error's body
_NEEDED = {
    "/inference/v1/generate": "--enable-scale-out",
    "/v1/load_lora_adapter": "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
}
_MOST_BYTES = 1 << 30  # of an answer: workers describe every tensor of theirs


class ServerEngine(AttachedEngine):
    """Connects to a server by its URL.

    Args:
        url: such as "http://10.0.0.7:8000".
        weight_version: of the weights it was started with.
        call_timeout: seconds until a call must be answered.
        api_key: what the server was started with (`--api-key`).
        connections: requests for completions that are open at once.

    Raises:
        EngineProcessError: nobody answers there; SyncError: the server was started without the settings above.
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
        self, prompts: list[list[int]], fields: list[dict[str, Any]], asked_of: Sequence[Served | None]
    ) -> list[Completion]:
        version = self.weight_version

        def answer(index: int) -> list[Completion]:
            adapter = asked_of[index]
            body = {"token_ids": prompts[index], "sampling_params": fields[index], "model": adapter and adapter.name}
            choices = self._post("/inference/v1/generate", body, Choices).choices
            return [_completion(index, choice, version) for choice in sorted(choices, key=lambda choice: choice.index)]

        return [found for several in self._pool.map(answer, range(len(prompts))) for found in several]

    def _sizes(self) -> tuple[int, int]:
        paths = ("/get_world_size?include_dp=false", "/get_world_size")
        one, all_of_them = (self._get(path, WorldSize).world_size for path in paths)
        return one, all_of_them

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

    def _claim_slot(self, name: str, update: Mapping[str, Any], served: Mapping[str, Served]) -> int:
        """vLLM's server knows adapters that it loaded from files: it gets one that changes nothing, and numbers it.

        Raises:
            SyncError: the name is that of an adapter of the owner's, or he loads one at this moment.
        """
        known = {model.id: str(model.root) for model in self._get("/v1/models", Models).data}
        if name in known and PLACEHOLDER not in known[name]:
            raise SyncError(f"{self} has loaded an adapter {name!r} from {known[name]}: give this one another name")
        if name in known:  # a trainer died just here
            left = self._load(name, update, load_inplace=True)[-1]
            self._release_slot(name)
            self._call_workers(in_slots, "remove", left)
        before = self._slot_ids()
        *others, newest = self._load(name, update)
        if newest in before or not set(others) <= set(before):
            self._release_slot(name)
            raise SyncError(f"{self} loaded other adapters while {name!r} was loaded: try again")
        return newest

    def _load(self, name: str, update: Mapping[str, Any], **how: bool) -> list[int]:
        """Returns all slot ids; the one that was loaded comes last."""
        paths = self._call_workers(in_slots, "write_without_effect", _first_module(update))  # theirs may be another host
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": paths[0], **how})
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
        """What the server answered, as `cls`; it may say more.

        Raises:
            SyncError: it is nothing like that; every wrong field is named.
        """
        problems: list[str] = []
        try:
            result = read_fields(cls, parse_json(answer.body, most_bytes=_MOST_BYTES), problems, others="ignore")
        except JSONTextError as error:
            raise SyncError(f"{self} answered {path} with what cannot be read: {error}") from error
        if result is None:
            raise SyncError(f"{self} answered {path} with what is not expected of vLLM: {listed(problems)}")
        return result

    def _ask(self, path: str, body: bytes | None, timeout: float) -> Answer:
        try:  # a trainer's proxies are not for its engines
            answer = request(self._url + path, body, self._headers, seconds=timeout, most_bytes=_MOST_BYTES, use_proxies=False)
        except TimeoutError as error:
            raise TransferTimeout(f"{self} did not answer {path} within {timeout:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, cut short, no HTTP, no URL
            raise EngineProcessError(f"{self} cannot be reached for {path}: {error}") from error
        if answer.status >= 300:
            raise self._refused(path, answer)
        return answer

    def _refused(self, path: str, answer: Answer) -> Exception:
        said = answer.body.decode(errors="replace")[:_SHOWN]
        if answer.status == 404 and '"error"' not in said:  # vLLM's own refusals say what is wrong
            needed = _NEEDED.get(path, "VLLM_SERVER_DEV_MODE=1")
            return SyncError(f"{self} has no {path}: start it with {needed}, or vLLM does not serve this route")
        if "EngineDead" in said:
            return EngineProcessError(f"the engine of {self} died: {said}")
        return SyncError(f"{self} answered {path} with status {answer.status}: {said}")


def _completion(prompt_index: int, choice: Choice, version: int) -> Completion:
    logprobs = [entry.logprob for entry in (choice.logprobs and choice.logprobs.content) or []]
    spans = [(span.version, span.start, span.end) for span in choice.weight_versions or []]
    return completion(prompt_index, choice.token_ids, logprobs, str(choice.finish_reason), spans, version)


def _first_module(update: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Names, dtypes and shapes of its two factors."""
    module = update["names"][0].rpartition(".lora_")[0]
    chosen = [index for index, name in enumerate(update["names"]) if name.startswith(f"{module}.lora_")]
    return {key: [update[key][index] for index in chosen] for key in ("names", "dtypes", "shapes")}
