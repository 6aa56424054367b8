"""What listens, where, and what becomes of whoever comes without the secret of a group."""

from __future__ import annotations

import os
import pickle
import socket
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mbridge_rl.core.errors import SyncError
from mbridge_rl.distributed import rendezvous
from mbridge_rl.distributed.rendezvous import (
    LOOPBACK,
    GroupAddress,
    SealedStore,
    make_group,
    new_secret,
    own_address,
    serve_store,
)
from mbridge_rl.sync.record.sinks import Prometheus
from mbridge_rl.sync.transports import Context
from mbridge_rl.sync.transports.process_group import GroupTransport

SOON = timedelta(seconds=20)


def listening() -> set[tuple[str, int]]:
    """The address and port of every listening socket of this process, as the kernel lists them."""
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    mine = {os.readlink(link)[8:-1] for link in links if link.is_symlink() and os.readlink(link).startswith("socket:[")}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                addresses.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return addresses


@pytest.fixture
def opened() -> Callable[[], set[tuple[str, int]]]:
    """What listens now and did not when the test began."""
    before = listening()
    return lambda: listening() - before


def test_a_store_listens_on_the_one_address_that_it_is_told(opened: Callable[[], set[tuple[str, int]]]) -> None:
    server = serve_store("127.0.0.2")
    assert opened() == {("127.0.0.2", server.port)}
    dist.TCPStore("127.0.0.2", server.port, is_master=False, timeout=SOON).set("a", "b")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, server.port))


def meeting_place(server: dist.TCPStore) -> GroupAddress:
    return GroupAddress(server.host, server.port, "g", new_secret(), "gloo", 2)


def met(addresses: list[GroupAddress], seconds: float = 20.0) -> list[Any]:
    """What becomes of the members, which come at the same time."""

    def member(rank: int) -> Any:
        try:
            return make_group(addresses[rank], rank, timedelta(seconds=seconds))
        except (SyncError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(member, range(len(addresses))))


def test_members_of_one_host_meet_and_listen_on_the_loopback_only(opened: Callable[[], set[tuple[str, int]]]) -> None:
    server = serve_store(LOOPBACK)
    address = meeting_place(server)
    first, second = met([address, address])
    got = [torch.zeros(3)]
    receiving = second.recv(got, 0, 0)
    first.send([torch.ones(3)], 1, 0).wait()
    receiving.wait()
    assert got[0].tolist() == [1, 1, 1]
    assert {address for address, _ in opened()} == {LOOPBACK}


def test_a_member_with_another_secret_is_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one whom the store does not stop: what it says there is not sealed, as for NCCL."""
    monkeypatch.setattr(SealedStore, "set", lambda self, key, value: self._store.set(key, value))
    monkeypatch.setattr(SealedStore, "get", lambda self, key: self._store.get(key))
    server = serve_store(LOOPBACK)
    stranger, member = met([meeting_place(server), meeting_place(server)])
    assert "member 1 of the process group g does not have its secret" in str(stranger)
    assert "member 0 of the process group g does not have its secret: a stranger is in it. Nothing was sent" in str(member)


def test_what_a_stranger_says_in_the_store_is_not_believed() -> None:
    server = serve_store(LOOPBACK)
    address = meeting_place(server)
    for outcome in met([address, replace(address, secret=new_secret())]):
        assert isinstance(outcome, SyncError)
        assert "somebody without the group's secret wrote" in str(outcome)


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_stranger_who_writes_first_stops_the_group_and_nothing_is_unpickled(tmp_path: Path) -> None:
    server = serve_store(LOOPBACK)
    address = meeting_place(server)
    stranger = dist.TCPStore(LOOPBACK, server.port, is_master=False, timeout=SOON)
    stranger.set("g/0/1", pickle.dumps(Bomb(tmp_path / "bomb")))  # in place of the second member
    outcome = met([address], seconds=5)[0]
    assert isinstance(outcome, SyncError)
    assert "somebody without the group's secret wrote 'g/0/1'" in str(outcome)
    assert not (tmp_path / "bomb").exists()


def test_junk_under_other_names_changes_nothing() -> None:
    server = serve_store(LOOPBACK)
    stranger = dist.TCPStore(LOOPBACK, server.port, is_master=False, timeout=SOON)
    stranger.set("g/secret", "anything")
    stranger.set("0/0", b"anything")
    with socket.create_connection((LOOPBACK, server.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        address = meeting_place(server)
        assert all(hasattr(group, "allgather") for group in met([address, address]))


def test_a_group_without_a_secret_is_not_joined() -> None:
    with pytest.raises(SyncError, match="has no secret"):
        make_group(replace(meeting_place(serve_store(LOOPBACK)), secret=""), 0, SOON)


@pytest.mark.parametrize(("one_host", "address"), [(True, LOOPBACK), (False, "127.0.0.3")])
def test_the_transport_listens_where_its_members_are(
    one_host: bool, address: str, opened: Callable[[], set[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbridge_rl.sync.transports.process_group.own_address", lambda: "127.0.0.3")

    class Route:
        workers = (None,)

        @staticmethod
        def parts_of(rank: int) -> list[Any]:
            return []

    class Group:
        rank, size = 0, 1
        share_plain = staticmethod(lambda value, types=(): value)

    device = torch.device("cpu")
    context = Context(Group(), Route(), 1, None, None, None, device)  # type: ignore[arg-type]
    transport = GroupTransport(context, one_host=one_host)
    wire, _ = transport.open(1, Route())  # type: ignore[arg-type]
    assert opened() == {(address, wire.address.port)}
    assert wire.address.host == address
    assert len(bytes.fromhex(wire.address.secret)) == 32
    other, _ = GroupTransport(context, one_host=one_host).open(1, Route())  # type: ignore[arg-type]
    assert other.address.secret != wire.address.secret
    transport.close()


def test_own_address_follows_the_interface_of_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == LOOPBACK
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(SyncError, match="GLOO_SOCKET_IFNAME=nowhere0: there is no such interface"):
        own_address()


def test_numbers_are_served_on_the_loopback_unless_told_otherwise(opened: Callable[[], set[tuple[str, int]]]) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    for address, named in ((LOOPBACK, {}), ("127.0.0.2", {"address": "127.0.0.2"})):
        sink = Prometheus(0, registry=prometheus_client.CollectorRegistry(), **named)
        ((listening_address, port),) = opened()
        assert listening_address == address
        assert b"mbridge_sync" in urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=20).read()
        sink.close()


def test_the_library_has_no_collective_that_pickles() -> None:
    """Ranks tell each other plain data (`distributed.plain`); pickles pass only through pipes between a process and its
    child."""
    library = Path(rendezvous.__file__).parents[1]
    pickling = ("all_gather_object", "broadcast_object_list", "gather_object(", "scatter_object_list", "send_object_list")
    for path in library.rglob("*.py"):
        assert not [word for word in pickling if word in path.read_text()], path
    users = {str(path.relative_to(library)) for path in library.rglob("*.py") if "pickle.loads" in path.read_text()}
    assert users == {"training/run/launcher.py", "training/rollout/reward_pool.py", "training/rollout/batches.py"}
