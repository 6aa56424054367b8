"""Where the members of a process group meet, and how they know each other.

Neither torch's store nor gloo or NCCL ask who connects. So the store listens on the one address that the members are told, and
each group has a secret, which its members get over the channel that introduces them (the engine client, the framework's own).
What gloo's members say of themselves in the store is signed with it, and when a group stands every member proves to all others
that it has the secret, before any of them sends or believes anything else.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mbridge_rl.core.errors import SyncError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # asks for the address of an interface
_BACKLOG = 4096
_NONCE_BYTES, _SEAL_BYTES = 16, 32


def new_secret() -> str:
    """For one group, known to its members only; text, so that it travels as plain JSON."""
    return secrets.token_hex(32)


def serve_store(address: str) -> dist.TCPStore:
    """A store that listens on this address alone, at a port of its own."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.bind((address, 0))
        listening.listen(_BACKLOG)
        port = listening.getsockname()[1]
        return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def own_address() -> str:
    """This host's address, as other hosts reach it: that of the interface `GLOO_SOCKET_IFNAME` if it is set, else what the
    host's name stands for; the loopback where it has no other."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            return socket.inet_ntoa(found[20:24])
        except OSError as error:
            raise SyncError(f"GLOO_SOCKET_IFNAME={interface}: there is no such interface with an address: {error}") from error
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOOPBACK


def make_group(wire: Mapping[str, Any], rank: int, timeout: timedelta) -> Any:
    """The process group of `wire`, as its member `rank`: `host` and `port` of the store, `group` (a name that is used once),
    `secret`, `backend` (gloo or nccl), `size`. All members make it together.

    Raises:
        SyncError: a member does not have the secret, or somebody else wrote into the store; RuntimeError: a member did not
            come.
    """
    if not wire.get("secret"):
        raise SyncError(f"the group {wire['group']} has no secret: is the mbridge_rl of its other end older?")
    store = dist.TCPStore(wire["host"], wire["port"], is_master=False, timeout=timeout)
    if wire["backend"] == "nccl":
        group = dist.ProcessGroupNCCL(dist.PrefixStore(wire["group"], store), rank, wire["size"], timeout)
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        sealed = SealedStore(store, wire["secret"])
        try:
            options = _gloo_options(wire["host"], timeout)
            group = dist.ProcessGroupGloo(dist.PrefixStore(wire["group"], sealed), rank, wire["size"], options)
        finally:
            sealed.raise_if_tampered()
        device = torch.device("cpu")
    require_members(lambda mine: _gathered(group, mine, wire["size"], device), rank, wire["secret"], wire["group"])
    return group


def require_members(gather: Callable[[bytes], Sequence[bytes]], rank: int, secret: str, name: str) -> None:
    """Every member proves that it has the group's secret: it signs what all others have just drawn, under its own rank.

    Args:
        gather: every member's bytes, of one length, by rank.
        name: of the group.

    Raises:
        SyncError: on every member: one of them could not.
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
    """A store in which only those who have the secret can say something; what others write is refused.

    Gloo calls it from its own threads, where an exception would be lost: `raise_if_tampered` repeats it.
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
        """Raises SyncError if anything was read that is not of a member."""
        if self._tampered:
            raise SyncError(f"{self._tampered}; nothing was sent. See that only trainer and engines reach that network")


def _seal(secret: str, content: bytes) -> bytes:
    return hmac.digest(secret.encode(), content, "sha256")


def _gathered(group: Any, mine: bytes, size: int, device: torch.device) -> list[bytes]:
    own = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    found = [torch.zeros_like(own) for _ in range(size)]
    group.allgather([found], [own]).wait()
    return [bytes(one.cpu().numpy()) for one in found]


def _gloo_options(host: str, timeout: timedelta) -> Any:
    """On one host the members listen on the loopback only; else on the interface that gloo chooses (`GLOO_SOCKET_IFNAME`)."""
    options = dist.ProcessGroupGloo._Options()
    gloo = dist.ProcessGroupGloo
    options._devices = [gloo.create_device(hostname=host) if host == LOOPBACK else gloo.create_default_device()]
    options._timeout, options._threads = timeout, 2
    return options
