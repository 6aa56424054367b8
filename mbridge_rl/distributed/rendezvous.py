"""The store in which the members of a process group meet, and the secret by which they recognise each other.

Neither torch's store nor gloo or NCCL check who connects. So the store listens only on the one address that the members get,
and each group has a secret, which its members get over the channel that introduces them (the engine client, the framework's
own).
Everything that gloo's members write into the store is signed with the secret. When a group is complete, every member proves to
all others that it has the secret, before any of them sends or trusts anything else.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from mbridge_rl.core.errors import SyncError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # the request for the address of an interface
_BACKLOG = 4096
_NONCE_BYTES, _SEAL_BYTES = 16, 32


def new_secret() -> str:
    """A secret for one group, which only its members get; it is text, so that it travels as plain JSON."""
    return secrets.token_hex(32)


def serve_store(address: str) -> dist.TCPStore:
    """A store that listens only on this address, at a port of its own."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.bind((address, 0))
        listening.listen(_BACKLOG)
        port = listening.getsockname()[1]
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def own_address() -> str:
    """The address at which other hosts reach this one: that of the interface `GLOO_SOCKET_IFNAME` if it is set, else the
    address of the host's name, else the loopback.

    Raises:
        SyncError: there is no such interface.
    """
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
        except OSError as error:
            raise SyncError(f"GLOO_SOCKET_IFNAME={interface}: there is no such interface with an address: {error}") from error
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOOPBACK


@dataclass(frozen=True)
class GroupAddress:
    """Where the members of a process group meet.

    Attributes:
        host: the host of the store.
        port: the port of the store.
        group: the name of the group, which is used once.
        secret: the secret of the group.
        backend: `gloo` or `nccl`.
        size: number of members.
    """

    host: str
    port: int
    group: str
    secret: str = field(repr=False)
    backend: Literal["gloo", "nccl"]
    size: int


def make_group(address: GroupAddress, rank: int, timeout: timedelta) -> Any:
    """Makes the process group of `address`. All members call it together.

    Args:
        address: where the members meet.
        rank: this member's rank in the group.
        timeout: how long to wait for the other members.

    Raises:
        SyncError: a member does not have the secret, or somebody else wrote into the store. RuntimeError: a member did not
            come.
    """
    if not address.secret:
        raise SyncError(f"the group {address.group} has no secret: is the mbridge_rl of its other end older?")
    store = dist.TCPStore(address.host, address.port, is_master=False, timeout=timeout)
    if address.backend == "nccl":
        group = dist.ProcessGroupNCCL(dist.PrefixStore(address.group, store), rank, address.size, timeout)
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        sealed = SealedStore(store, address.secret)
        try:
            options = _gloo_options(address.host, timeout)
            group = dist.ProcessGroupGloo(dist.PrefixStore(address.group, sealed), rank, address.size, options)
        finally:
            sealed.raise_if_tampered()
        device = torch.device("cpu")
    require_members(lambda own: _gathered(group, own, address.size, device), rank, address.secret, address.group)
    return group


def require_members(gather: Callable[[bytes], Sequence[bytes]], rank: int, secret: str, name: str) -> None:
    """Lets every member prove that it has the group's secret: it signs the nonces that all members have just drawn, with its
    own rank.

    Args:
        gather: collective; takes this member's bytes and returns those of all members, all of one length, by rank.
        rank: this member's rank.
        secret: the group's secret.
        name: the name of the group.

    Raises:
        SyncError: on every member, if one of them could not.
    """
    nonces = gather(secrets.token_bytes(_NONCE_BYTES))
    challenge = f"{name}|{len(nonces)}|".encode() + b"".join(nonces)
    for member, seal in enumerate(gather(_seal(secret, challenge + f"|{rank}".encode()))):
        if not hmac.compare_digest(seal, _seal(secret, challenge + f"|{member}".encode())):
            raise SyncError(
                f"member {member} of the process group {name} does not have its secret: a stranger is in it. Nothing was sent; "
                "see that only trainer and engines reach the network that they meet on"
            )


class SealedStore(dist.Store):
    """A store to which only processes with the secret can write; values that others write are refused when they are read.

    Gloo calls it from its own threads, where an exception is lost, so `raise_if_tampered` raises it again.
    """

    def __init__(self, store: dist.Store, secret: str) -> None:
        super().__init__()
        self._store, self._secret = store, secret
        self._tampered = ""

    def set(self, key: str, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, content + _seal(self._secret, key.encode() + b"\0" + content))

    def get(self, key: str) -> bytes:
        sealed = self._store.get(key)
        content, seal = sealed[:-_SEAL_BYTES], sealed[-_SEAL_BYTES:]
        if not hmac.compare_digest(seal, _seal(self._secret, key.encode() + b"\0" + content)):
            self._tampered = f"somebody without the group's secret wrote {key!r} into the store where its members meet"
            self.raise_if_tampered()
        return content

    def wait(self, *arguments: Any) -> None:
        self._store.wait(*arguments)

    def has_extended_api(self) -> bool:
        return False

    def raise_if_tampered(self) -> None:
        """Raises the error of an earlier read again.

        Raises:
            SyncError: a value was read that no member wrote.
        """
        if self._tampered:
            raise SyncError(f"{self._tampered}; nothing was sent. See that only trainer and engines reach that network")


def _seal(secret: str, content: bytes) -> bytes:
    return hmac.digest(secret.encode(), content, "sha256")


def _gathered(group: Any, own: bytes, size: int, device: torch.device) -> list[bytes]:
    message = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    messages = [torch.zeros_like(message) for _ in range(size)]
    group.allgather([messages], [message]).wait()
    return [bytes(received.cpu().numpy()) for received in messages]


def _gloo_options(host: str, timeout: timedelta) -> Any:
    """Gloo's options: on one host the members listen only on the loopback, else on the interface that gloo chooses
    (`GLOO_SOCKET_IFNAME`)."""
    options = dist.ProcessGroupGloo._Options()
    gloo = dist.ProcessGroupGloo
    options._devices = [gloo.create_device(hostname=host) if host == LOOPBACK else gloo.create_default_device()]
    options._timeout, options._threads = timeout, 2
    return options
