"""HTTP requests that end: a time for the whole of one, from the name's lookup to the last byte, and a size for its answer.

A socket's own timeout is for every single read, so that a server that sends a byte now and then holds its client for ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPSConnection
from typing import IO, Any

_CHUNK = 1 << 20
_MOST_REFUSAL_BYTES = 1 << 16  # of the body of an answer that refuses


class AnswerTooLarge(OSError):
    """An answer has more bytes than its caller takes."""


@dataclass(frozen=True)
class Answer:
    """Attributes:
    status: of HTTP.
    content_type: without parameters, such as "application/json".
    body: of an answer that refuses (400 and more) at most 64 KiB.
    """

    status: int
    content_type: str
    body: bytes


def request(
    url: str, body: bytes | None, headers: Mapping[str, str], *, seconds: float, most_bytes: int, use_proxies: bool = True
) -> Answer:
    """What a server answers to a POST of `body`, or to a GET where it is `None`. Redirects are answers, and are not followed.

    Raises:
        TimeoutError: it was not complete within `seconds`.
        AnswerTooLarge: it has more than `most_bytes`.
        OSError, http.client.HTTPException, ValueError: the server cannot be reached, speaks no HTTP, or `url` is none.
    """
    exchange = _Exchange(urllib.request.Request(url, body, dict(headers)), seconds, most_bytes, use_proxies)
    # Daemonic: the lookup of a name cannot be interrupted, and must not keep the interpreter from its end.
    thread = threading.Thread(target=exchange.run, name="http-request", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        exchange.abandon()
        raise TimeoutError(f"no complete answer within {seconds:g} s")
    if isinstance(exchange.outcome, Exception):
        raise exchange.outcome
    return exchange.outcome


class _Exchange:
    """One request, made in a thread that another may make give up.

    Attributes:
        outcome: what the server answered, or what kept it from that.
    """

    def __init__(self, asked: urllib.request.Request, seconds: float, most_bytes: int, use_proxies: bool) -> None:
        self._asked, self._seconds, self._most_bytes = asked, seconds, most_bytes
        proxies = [] if use_proxies else [urllib.request.ProxyHandler({})]
        self._opener = urllib.request.build_opener(_NoRedirects, _Handler(self), _SecureHandler(self), *proxies)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._abandoned = False
        self.outcome: Answer | Exception = TimeoutError("the request was not made")

    def run(self) -> None:
        try:
            try:
                with self._opener.open(self._asked, timeout=self._seconds) as response:
                    self.outcome = Answer(response.status, *_content(response, self._most_bytes))
            except urllib.error.HTTPError as refusal:
                with refusal:
                    self.outcome = Answer(refusal.code, *_content(refusal, _MOST_REFUSAL_BYTES, cut=True))
        except Exception as error:  # whatever it is: the caller's thread raises it
            self.outcome = error

    def connected(self, connection: socket.socket) -> None:
        """The socket that `abandon` will end.

        Raises:
            TimeoutError: that was before.
        """
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise TimeoutError("connected too late")

    def abandon(self) -> None:
        """Ends the connection, and with it the thread; one that is still connecting ends by itself."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    self._socket.shutdown(socket.SHUT_RDWR)


def _content(response: Any, most_bytes: int, *, cut: bool = False) -> tuple[str, bytes]:
    """Type and body. A body of more than `most_bytes` is cut, or refused."""
    parts, count = [], 0
    while count <= most_bytes and (part := response.read(min(_CHUNK, most_bytes + 1 - count))):
        parts.append(part)
        count += len(part)
    if count > most_bytes and not cut:
        raise AnswerTooLarge(f"an answer of more than {most_bytes:,} bytes")
    return response.headers.get_content_type(), b"".join(parts)[:most_bytes]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """None: the redirect is raised as an `HTTPError`."""


def _tells(exchange: _Exchange, of: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
    """Makes connections that tell the exchange of their sockets."""

    class Connection(of):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            exchange.connected(self.sock)

    return Connection


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_tells(self._exchange, HTTPConnection), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_tells(self._exchange, HTTPSConnection), req)
