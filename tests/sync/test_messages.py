"""Messages between processes: every one survives JSON unchanged, and one of another schema, or malformed, is refused by name
before anything changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standin import StandInEngine, light_model, random_weights

from mbridge_rl.core.errors import MessageError, StoreError
from mbridge_rl.core.failure import Failure
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.rendezvous import GroupAddress
from mbridge_rl.sync.payload import adapter_messages, message_codec, messages, wires
from mbridge_rl.sync.payload.landing import Landing, ShapedView
from mbridge_rl.sync.payload.message_codec import Message, decode, encode
from mbridge_rl.sync.payload.messages import Answer, Introduction, UpdateRequest, WorkerCall, WorkerStatus
from mbridge_rl.sync.payload.route import Bucket, Part, Piece, WorkerRoute
from mbridge_rl.sync.payload.wires import FilesWire, GroupWire, IpcWire, RingWire, StoreWire
from mbridge_rl.sync.record.timeline import Span
from mbridge_rl.sync.vllm.engines.attached import AttachedEngine
from mbridge_rl.sync.vllm.extension import WorkerExtension
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.weight_sync import WeightSync

SPAN = Span("worker 1", "load", "", 1.5, 2.5, 0.75)
TENSORS = (HFTensor("a.weight", torch.bfloat16, (3, 5)), HFTensor("b", torch.float8_e4m3fn, ()))
RING = {"paths": ("/dev/shm/a", "/dev/shm/b"), "update": 7, "sources": 2, "replicas": 3, "cell_bytes": (0, 512)}
REPORT = {"version": 3, "fill": "f", "bytes": 1 << 40, "seconds": {"load": 0.5}, "spans": (SPAN,)}
STORE = messages.HostStore("policy.0", "/dev/shm", True, "s", "token", (4096, 512))
SAMPLES: list[Message] = [
    StoreWire(name="policy", directory="/dev/shm", token="t", fill="f", committed=True, replica=2),
    RingWire(**RING),
    IpcWire(**RING, handles=({"0": [0, "AA==", 12, True]}, {})),
    GroupWire(address=GroupAddress("10.0.0.1", 29500, "g", "s", "gloo", 6), trainers=2, workers=2, replicas=2, replica=1),
    FilesWire(url="memory://a"),
    UpdateRequest(3, "f", "feed", "streaming", FilesWire(url="x"), 2.5, "abort", STORE, messages.DeltaBase(("p",), ((1, 2),))),
    WorkerStatus(True, Failure("StoreError", "it is gone"), "proof", "fill"),
    messages.WorkerIdentity("a reason", None),
    messages.WorkerReport(rank=1, digests={"a": "00ff"}, unsplit=("b",), **REPORT),
    messages.CommitReport(workers=2, bytes_per_worker=(1, 2), digest=None, proven_live=3, proven_received=1, **REPORT),
    Answer([1, {"a": [WorkerStatus(False)]}]),
    messages.WorkerCall("begin", (1, "a", None)),
    Answer(failure=Failure("StoreError", "it is gone")),
    adapter_messages.AdapterUpdate("p", 2, True, "wait", 3.0, 8, TENSORS, (0, 64), ("a", "b"), "/dev/shm/c", 128, "QQ=="),
    adapter_messages.AdapterModule(TENSORS),
    adapter_messages.AdapterSlotsInfo("bfloat16", 3, 8, "host"),
    adapter_messages.ServedAdapter("p", 1, 2),
    adapter_messages.SlotReport(2, 64, "d", 2),
    adapter_messages.AdapterReport("p", 2, 2, 64, "d", 2, (SPAN,)),
]


@pytest.fixture(scope="module")
def introduction() -> Iterator[Introduction]:
    """The introduction of a real meeting."""
    bridge, model = light_model("qwen3", ParallelLayout(), 0, random_weights("qwen3", 0))
    sync = WeightSync(bridge, model, StandInEngine(untraceable=["model.norm.weight"]))
    yield sync._meeting.introduction
    sync.close()


def test_every_message_survives_json(introduction: Introduction) -> None:
    samples = [*SAMPLES, introduction.announcement, *introduction.workers]
    for sample in samples:
        assert decode(json.loads(json.dumps(encode(sample)))) == sample
    read = Introduction.from_json(json.loads(json.dumps(introduction.to_json())))
    assert read.to_json() == introduction.to_json()
    assert dataclasses.replace(read, routes=()) == dataclasses.replace(introduction, routes=())
    defined = {name for module in (messages, wires, adapter_messages) for name in vars(module) if _is_message(module, name)}
    assert defined - {"Wire"} == {
        type(sample).__name__ for sample in [*samples, introduction, STORE, messages.DeltaBase((), ())]
    }


def _is_message(module: Any, name: str) -> bool:
    value = getattr(module, name)
    return isinstance(value, type) and issubclass(value, Message) and value.__module__ == module.__name__


def another_schema(fields: dict[str, Any]) -> None:
    fields["$schema"] = message_codec.SCHEMA + 1


def no_schema(fields: dict[str, Any]) -> None:
    del fields["$schema"]


def another_class(fields: dict[str, Any]) -> None:
    fields["$message"] = "Prophecy"


def another_field(fields: dict[str, Any]) -> None:
    fields["vesion"] = 1


def no_version(fields: dict[str, Any]) -> None:
    del fields["version"]


def text_for_a_number(fields: dict[str, Any]) -> None:
    fields["timeout"] = "2.5"


def another_mode(fields: dict[str, Any]) -> None:
    fields["mode"] = "sideways"


def another_wire(fields: dict[str, Any]) -> None:
    fields["wire"] = {"url": "x"}


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (another_schema, "the message 'UpdateRequest' has schema 2, this mbridge_rl has schema 1: install the same"),
        (no_schema, "the message 'UpdateRequest' has schema None"),
        (another_class, "there is no message 'Prophecy' in schema 1"),
        (another_field, "UpdateRequest.vesion: there is no such field"),
        (no_version, "UpdateRequest.version: is missing"),
        (text_for_a_number, "UpdateRequest.timeout: a number is needed, found '2.5'"),
        (another_mode, "UpdateRequest.mode: 'sideways' is none of staged, streaming"),
        (another_wire, "UpdateRequest.wire.url: there is no such field"),
    ],
)
def test_what_is_no_message_of_this_schema_is_refused_by_name(damage: Callable[[dict[str, Any]], None], text: str) -> None:
    fields = json.loads(json.dumps(SAMPLES[5].to_json()))
    damage(fields)
    with pytest.raises(MessageError) as caught:
        decode([fields])
    assert text in str(caught.value)


def test_damaged_compact_fields_are_refused(introduction: Introduction) -> None:
    fields = introduction.workers[0].to_json()
    name = next(iter(fields["parameters"]))
    fields["parameters"][name] = ["float33", [1]]
    with pytest.raises(MessageError, match="the message WorkerDescription cannot be read: ValueError: 'float33' is no dtype"):
        decode(fields)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A vLLM worker with our extension, whose backend holds a stand-in's first receiver."""
    receiver = StandInEngine().receivers[0]
    holder = SimpleNamespace(payload=receiver, serving=receiver.serving, unusable=None)
    monkeypatch.setattr(worker_calls, "backend_of", lambda worker: SimpleNamespace(receiver=holder))
    return SimpleNamespace(payload=receiver, rank=0)


def test_a_trainer_of_another_schema_changes_nothing(worker: SimpleNamespace, introduction: Introduction) -> None:
    def failure_of(*call: Any) -> Failure:
        answer = Answer.from_json(WorkerExtension.mbridge_rl_call(worker, *call))  # type: ignore[arg-type]
        assert answer.failure is not None
        assert answer.failure.kind == "MessageError"
        return answer.failure

    worker.payload.adopt(0, introduction)
    before = worker.payload.status()
    arguments = {"describe": introduction.announcement, "adopt": introduction, "begin": SAMPLES[5], "lose": 3, "abort": "so"}
    for name, argument in arguments.items():  # every call carries the schema, whatever its arguments are
        failure = failure_of(WorkerCall(name, (argument,)).to_json() | {"$schema": 99})
        assert "the message 'WorkerCall' has schema 99" in failure.message
    fields = WorkerCall("begin", (SAMPLES[5],)).to_json()
    fields["arguments"] = [SAMPLES[5].to_json() | {"$schema": 99}]
    assert "the message 'UpdateRequest' has schema 99" in failure_of(fields).message
    unknown = failure_of(WorkerCall("receive_shards", (1,)).to_json())
    assert "knows no call 'receive_shards', only describe, adopt, begin" in unknown.message
    old = failure_of("begin", {"version": 1})  # as version 0.1 calls
    assert "the trainer sent str, expected the message WorkerCall of schema 1" in old.message
    assert worker.payload.status() == before
    assert not worker.payload.is_open
    assert worker.payload.serving.updating is None


def test_an_engine_of_another_mbridge_rl_is_refused_by_name() -> None:
    with pytest.raises(MessageError, match="engine worker 1 sent list, expected the message Answer of schema 1"):
        worker_calls.results_of([Answer(1).to_json(), [True, {"arrived": True}]])
    engine = StandInEngine()
    engine.describe = lambda announcement: [{"rank": 0}]  # type: ignore[method-assign,list-item,return-value]
    bridge, model = light_model("qwen3", ParallelLayout(), 0, random_weights("qwen3", 0))
    with pytest.raises(MessageError, match="engine 0 sent dict, expected the message WorkerDescription"):
        WeightSync(bridge, model, engine)


def test_a_store_of_another_mbridge_rl_is_not_loaded() -> None:
    name = f"messages.{os.getpid()}"
    bridge, model = light_model("qwen3", ParallelLayout(), 0, random_weights("qwen3", 1))
    sync = WeightSync(bridge, model, StandInEngine(), store=name)
    sync.sync(1)
    late, described = StandInEngine(), sync.store.description
    before = late.generate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sync.store), "description", lambda store, fingerprint: described(fingerprint) | {"$schema": 0})
        with pytest.raises(MessageError, match="the message 'Introduction' has schema 0"):
            late.catch_up(name, "/dev/shm")
    assert late.generate() == before
    late.catch_up(name, "/dev/shm")
    assert late.generate() != before
    sync.close()
    sync.store.remove()
    with pytest.raises(StoreError, match="nothing was committed"):
        late.catch_up(name, "/dev/shm")


class OtherServer(AttachedEngine):
    """A server whose workers have an mbridge_rl of another schema."""

    def __init__(self, schema: int) -> None:
        self.answer = Answer(messages.WorkerIdentity(None, None).to_json()).to_json() | {"$schema": schema}
        self._attach(0)

    def __str__(self) -> str:
        return "the server"

    def _sizes(self) -> tuple[int, int]:
        return 1, 1

    def _rpc(self, method: str, args: list[Any]) -> list[Any]:
        json.dumps(args)
        return [self.answer]

    def _label(self) -> str:
        return "0"

    def _halt(self, requests: str, timeout: float) -> None: ...
    def _go_on(self) -> None: ...
    def _set_label(self, label: str) -> None: ...
    def _reset_caches(self) -> bool:
        return True

    def _completions(self, prompts: Any, fields: Any, adapters: Any) -> list[Any]:
        return []


def test_a_server_of_another_schema_is_refused_by_name_when_a_trainer_connects() -> None:
    assert OtherServer(message_codec.SCHEMA).weight_version == 0
    with pytest.raises(MessageError, match="the message 'Answer' has schema 7, this mbridge_rl has schema 1"):
        OtherServer(7)


def described(cls: type[Any]) -> list[Any]:
    """The fields of a message and of everything inside of it, with their types."""
    return [(field.name, str(field.type)) for field in dataclasses.fields(cls)]


def test_the_schema_grows_with_every_change_of_a_field() -> None:
    """If this fails, a message has changed: raise `SCHEMA`, and write down the new hash here."""
    known = {1: "dd03296040710c07"}
    classes = [type(sample) for sample in SAMPLES] + [Introduction, messages.Announcement, messages.WorkerDescription]
    classes += [messages.HostStore, messages.DeltaBase, Failure, Span, GroupAddress, HFTensor, Landing, ShapedView]
    classes += [WorkerRoute, Bucket, Part, Piece]
    fields = {cls.__name__: described(cls) for cls in classes}
    text = json.dumps(fields, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == known[message_codec.SCHEMA], text
