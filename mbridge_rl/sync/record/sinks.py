"""The sinks of sync reports: the log (always), JSON lines, Prometheus, TensorBoard. A sink is a function of a `SyncReport`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mbridge_rl.core.errors import BridgeError, missing_extra
from mbridge_rl.sync.record.json_lines import json_lines
from mbridge_rl.sync.record.report import SyncReport

_log = logging.getLogger(__name__)

SYNCS_FILE = "syncs.jsonl"

Sink = Callable[[SyncReport], None]


def tell(sinks: Iterable[Sink], report: SyncReport) -> None:
    """Gives a report to the log and to every sink. The sync is over, and its ranks must not diverge because of a sink, so the
    error of a sink that fails is only logged, with its traceback."""
    _to_log(report)
    for sink in sinks:
        try:
            sink(report)
        except Exception:
            _log.exception("the sink %r failed at version %d; the sync itself is not affected", sink, report.version)


def _to_log(report: SyncReport) -> None:
    if report.error:
        _log.error(
            "version %d failed after %.3f s, attempt %d: %s", report.version, report.seconds, report.attempts, report.error
        )
        return
    _log.info(
        "version %d: %d bytes in %.3f s, %.2f GB/s, digest %s, attempt %d, pause %.3f s, %s",
        report.version,
        report.nbytes,
        report.seconds,
        report.gigabytes_per_second,
        report.digest,
        report.attempts,
        report.pause_seconds,
        " ".join(f"{phase} {seconds:.3f}" for phase, seconds in report.phases.items()),
    )


class JsonLines:
    """Appends each report to a file, one line at a time; `read_syncs` reads the file, also while it grows."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, report: SyncReport) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(report.to_json()) + "\n")


def read_syncs(path: str | Path) -> list[SyncReport]:
    """The reports in a file of `JsonLines`, or in that file of a run's folder. An unfinished last line is left out.

    Raises:
        BridgeError: there is no such file, it holds no complete report, or a line of it is not a report.
    """
    path = Path(path)
    path = path / SYNCS_FILE if path.is_dir() else path
    reports = [SyncReport.from_json(line) for line in json_lines(path)] if path.exists() else []
    if not reports:
        raise BridgeError(f"{path} has no complete record of a sync: is it of WeightSync(sinks=[JsonLines(...)]), or of a run?")
    return reports


def numbers(report: SyncReport) -> dict[str, float]:
    """A report as flat names and numbers, for tools that draw curves: `seconds`, `phase/transfer`, `slowest/worker/load`."""
    flat: dict[str, float] = {
        "seconds": report.seconds,
        "bytes": report.nbytes,
        "gigabytes_per_second": report.gigabytes_per_second,
        "retries": report.retries,
        "pause_seconds": report.pause_seconds,
        "failed": float(bool(report.error)),
    }
    flat |= {f"phase/{phase}": seconds for phase, seconds in report.phases.items()}
    for side, phases in report.slowest.items():
        flat |= {f"slowest/{side}/{phase}": seconds for phase, seconds in phases.items()}
    return flat


class TensorBoard:
    """Writes curves over versions, under `sync/`.

    Args:
        writer: a `SummaryWriter`, or the folder for a new one.

    Raises:
        ImportError: a folder was given and TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = open_tensorboard(writer) if isinstance(writer, str | Path) else writer

    def __call__(self, report: SyncReport) -> None:
        for name, value in numbers(report).items():
            self._writer.add_scalar(f"sync/{name}", value, report.version)
        self._writer.add_text("sync/digest", report.error or str(report.digest), report.version)
        self._writer.flush()


def open_tensorboard(directory: str | Path, **options: Any) -> Any:
    """A `SummaryWriter`.

    Raises:
        ImportError: TensorBoard is not installed; the message says what to install.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra("this needs TensorBoard", "tensorboard") from error
    return SummaryWriter(str(directory), **options)


class Prometheus:
    """Keeps counters, histograms and gauges named `mbridge_sync_*` in a registry, and serves it if a port is given.

    Args:
        port: the port at which to serve the registry over HTTP; `None` leaves that to the process.
        address: the address at which the port is opened. Everyone who reaches it can read all numbers of the process's
            registry; the loopback is for a Prometheus on this host, or for a proxy on it that asks for a password.
        registry: a `CollectorRegistry`; `None` means the process's default one.
        labels: labels that all metrics get, such as `{"run": "grpo-7b"}`.

    Raises:
        ImportError: prometheus_client is not installed. OSError: the port is taken.
    """

    def __init__(
        self,
        port: int | None = None,
        *,
        address: str = "127.0.0.1",
        registry: Any = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import prometheus_client as client
        except ImportError as error:
            raise missing_extra("this needs prometheus_client", "prometheus") from error
        registry = client.REGISTRY if registry is None else registry
        self._labels = dict(labels or {})
        names = tuple(self._labels)
        counted = {"registry": registry, "namespace": "mbridge", "subsystem": "sync"}
        timed = {**counted, "buckets": _SECONDS}
        self._syncs = client.Counter("syncs", "Syncs that ended", (*names, "outcome"), **counted)
        self._bytes = client.Counter("bytes", "Bytes that the workers of one engine received", names, **counted)
        self._retries = client.Counter("retries", "Attempts that failed and were made again", names, **counted)
        self._seconds = client.Histogram("seconds", "Wall time of a sync", names, **timed)
        self._pause = client.Histogram("pause_seconds", "Time in which an engine did not generate", names, **timed)
        self._phase = client.Histogram("phase_seconds", "Time by phase of rank 0", (*names, "phase"), **timed)
        self._slowest = client.Gauge("slowest_seconds", "Of the slowest, last sync", (*names, "side", "phase"), **counted)
        self._speed = client.Gauge("gigabytes_per_second", "Of the last sync", names, **counted)
        self._version = client.Gauge("version", "That was committed last", names, **counted)
        self._digest = client.Info("committed", "Version and digest that were committed last", names, **counted)
        self._server = None if port is None else client.start_http_server(port, addr=address, registry=registry)

    def __call__(self, report: SyncReport) -> None:
        self._of(self._syncs, outcome="failed" if report.error else "committed").inc()
        self._of(self._retries).inc(report.retries)
        self._of(self._seconds).observe(report.seconds)
        for phase, seconds in report.phases.items():
            self._of(self._phase, phase=phase).observe(seconds)
        if report.error:
            return
        self._of(self._bytes).inc(report.nbytes)
        self._of(self._pause).observe(report.pause_seconds)
        for side, phases in report.slowest.items():
            for phase, seconds in phases.items():
                self._of(self._slowest, side=side, phase=phase).set(seconds)
        self._of(self._speed).set(report.gigabytes_per_second)
        self._of(self._version).set(report.version)
        self._of(self._digest).info({"version": str(report.version), "digest": str(report.digest)})

    def close(self) -> None:
        """Ends the server, if this started one."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def _of(self, metric: Any, **labels: str) -> Any:
        labels = self._labels | labels
        return metric.labels(**labels) if labels else metric


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
