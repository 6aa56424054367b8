"""HTTP requests with a time limit for the whole request, from the name's lookup to the last byte, and a size limit for the
answer.

A socket's own timeout applies to every single read, so that a server that sends a byte now and then could block its client for
ever.
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
_MOST_REFUSAL_BYTES = 1 << 16  # of the body of an error answer


class AnswerTooLarge(OSError):
    """An answer has more bytes than its caller allows."""


@dataclass(frozen=True)
class Answer:
    """Attributes:
    status: the HTTP status.
    content_type: the content type without parameters, such as "application/json".
    body: the body; of an error answer (status 400 and more) at most 64 KiB.
    """

    status: int
    content_type: str
    body: bytes


def request(
    url: str, body: bytes | None, headers: Mapping[str, str], *, seconds: float, most_bytes: int, use_proxies: bool = True
) -> Answer:
    """Sends a POST of `body`, or a GET if it is `None`, and returns the server's answer. Redirects are answers, and are not
    followed.

    Raises:
        TimeoutError: the answer was not complete within `seconds`.
        AnswerTooLarge: the answer has more than `most_bytes`.
        OSError, http.client.HTTPException, ValueError: the server cannot be reached or does not speak HTTP, or `url` is no URL.
    """
    exchange = _Exchange(urllib.request.Request(url, body, dict(headers)), seconds, most_bytes, use_proxies)
    # A daemon thread: the lookup of a name cannot be interrupted, and must not keep the interpreter from exiting.
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
    """One request, made in a thread that another thread may abandon.

    Attributes:
        outcome: the server's answer, or the error of the request.
    """

    def __init__(self, request: urllib.request.Request, seconds: float, most_bytes: int, use_proxies: bool) -> None:
        self._request, self._seconds, self._most_bytes = request, seconds, most_bytes
        proxies = [] if use_proxies else [urllib.request.ProxyHandler({})]
        self._opener = urllib.request.build_opener(_NoRedirects, _Handler(self), _SecureHandler(self), *proxies)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._abandoned = False
        self.outcome: Answer | Exception = TimeoutError("the request was not made")

    def run(self) -> None:
        try:
            try:
                with self._opener.open(self._request, timeout=self._seconds) as response:
                    self.outcome = Answer(response.status, *_content(response, self._most_bytes))
            except urllib.error.HTTPError as refusal:
                with refusal:
                    self.outcome = Answer(refusal.code, *_content(refusal, _MOST_REFUSAL_BYTES, cut=True))
        except Exception as error:  # the caller's thread raises it
            self.outcome = error

    def connected(self, connection: socket.socket) -> None:
        """Registers the socket that `abandon` will close.

        Raises:
            TimeoutError: the request was abandoned before.
        """
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise TimeoutError("connected too late")

    def abandon(self) -> None:
        """Ends the connection, and with it the thread. A thread that is still connecting ends as soon as it is connected."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    self._socket.shutdown(socket.SHUT_RDWR)


def _content(response: Any, most_bytes: int, *, cut: bool = False) -> tuple[str, bytes]:
    """The content type and the body. A body of more than `most_bytes` is cut if `cut` is set, otherwise refused."""
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
        """Returns `None`, so that the redirect is raised as an `HTTPError`."""


def _registering(exchange: _Exchange, base: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
    """A class of connections that register their sockets with the exchange."""

    class Connection(base):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            exchange.connected(self.sock)

    return Connection


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_registering(self._exchange, HTTPConnection), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_registering(self._exchange, HTTPSConnection), req)
