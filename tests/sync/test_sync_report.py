"""Records of syncs: where the time went adds up, and every sink hears of every sync, also of those that failed."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from fused_engine import EngineLayout
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights
from typer.testing import CliRunner
from web_pages import assert_self_contained

from mbridge_rl.cli import app
from mbridge_rl.core.errors import BridgeError, NonFiniteWeights
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.record.sinks import JsonLines, Prometheus, TensorBoard, read_syncs
from mbridge_rl.sync.record.timeline import Span, Stopwatch, outermost, slowest
from mbridge_rl.sync.record.timeline_page import timeline, write_page
from mbridge_rl.sync.transports.shared_memory import SlotOutlet
from mbridge_rl.sync.weight_sync import WeightSync

# What may lie between the phases of a sync: a few function calls, on a machine whose cores others use as well.
UNEXPLAINED_SHARE, UNEXPLAINED_SECONDS = 0.02, 0.01


def broken_sink(report: SyncReport) -> None:
    raise OSError("the disk is full")


def three_syncs(rank: int, path: Path) -> dict[str, Any]:
    """One that goes well, one whose first attempt is torn, and one that is refused."""
    bridge, model = light_model("qwen3", ParallelLayout(tp=2), rank, random_weights("qwen3", 1))
    engines = [StandInEngine("qwen3", EngineLayout(tp=2)) for _ in range(2)] if rank == 0 else None
    logging.getLogger("mbridge_rl").setLevel(logging.CRITICAL)
    prometheus = Prometheus(0, labels={"run": "test"}) if rank == 0 else broken_sink
    sinks = (
        [broken_sink, JsonLines(path / "syncs.jsonl"), prometheus, TensorBoard(path / "board")] if rank == 0 else [prometheus]
    )
    sync = WeightSync(bridge, model, engines, bucket_bytes=1 << 13, timeout=20.0, sinks=sinks)
    reports, send, tears = [sync.sync(1)], SlotOutlet.send, [0]

    def tear(outlet: SlotOutlet, worker: int, index: int, part: Any) -> None:
        send(outlet, worker, index, part)
        if part.pieces and not tears[0]:
            tears[0] = 1
            outlet.place(worker, index, part)[8:9].bitwise_xor_(4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotOutlet, "send", tear)
        reports.append(sync.sync(2))
    next(model[0].parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteWeights):
        sync.sync(3)
    sync.close()
    scraped = ""
    if isinstance(prometheus, Prometheus):
        port = prometheus._server[0].server_port
        scraped = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        prometheus.close()
    return {"reports": reports, "scraped": scraped}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("tensorboard")
    pytest.importorskip("prometheus_client")
    path = tmp_path_factory.mktemp("syncs")
    return path, run_ranks(three_syncs, 2, path)


def test_phases_add_up_to_the_wall_time(recorded: Any) -> None:
    _, ranks = recorded
    for rank, results in enumerate(ranks):
        for report in results["reports"]:
            assert report.rank == rank
            unexplained = report.seconds - sum(report.phases.values())
            assert 0 <= unexplained < max(UNEXPLAINED_SHARE * report.seconds, UNEXPLAINED_SECONDS)
            assert set(report.phases) == {"check", "begin", "transfer", "verify", "decide", "commit", "report"}


def test_spans_nest_and_follow_one_another(recorded: Any) -> None:
    _, (first, _) = recorded
    report = first["reports"][0]
    lanes = {span.lane for span in report.spans}
    assert lanes == {
        *(f"rank {rank}" for rank in range(2)),
        *(f"engine {index}" for index in range(2)),
        *(f"engine {index} worker {worker}" for index in range(2) for worker in range(2)),
    }
    by_name = {(span.lane, span.phase): span for span in report.spans}
    slack = 1e-3  # clocks of different processes may differ by this
    for span in report.spans:
        assert span.busy <= span.end - span.start + 1e-6
        if span.inside:
            outer = by_name[span.lane, span.inside]
            assert outer.start <= span.start
            assert span.end <= outer.end + 1e-6
    commit = by_name["rank 0", "commit"]
    for lane in lanes - {"rank 0", "rank 1"}:
        for span in (span for span in report.spans if span.lane == lane):
            assert commit.start - slack <= span.start <= span.end <= commit.end + slack
    assert by_name["rank 0", "plan"].end <= report.started + slack
    assert {"plan", "pack", "wire"} <= set(report.slowest["rank"])
    assert {"load", "write", "verify", "derive"} <= set(report.slowest["worker"])
    assert 0 < report.pause_seconds <= report.phases["commit"]
    assert "plan" not in first["reports"][1].slowest["rank"]


def test_every_sink_hears_of_every_sync(recorded: Any) -> None:
    path, (first, _) = recorded
    good, retried, failed = read_syncs(path)
    assert [good, retried] == first["reports"]
    assert (good.retries, retried.retries) == (0, 1)
    assert retried.phases["transfer"] > max(
        span.busy for span in retried.spans if (span.lane, span.phase) == ("rank 0", "transfer")
    )  # both attempts
    assert good.digest == retried.digest == good.engines[1]["digest"]
    assert (failed.version, failed.digest, failed.verified, failed.engines) == (3, None, False, [])
    assert failed.error.startswith("NonFiniteWeights: rank 0: 1 parameters hold NaN")
    assert set(failed.phases) == {"check"}  # before anything is sent

    scraped = dict(line.rsplit(" ", 1) for line in first["scraped"].splitlines() if line.startswith("mbridge_sync"))
    assert float(scraped['mbridge_sync_syncs_total{outcome="committed",run="test"}']) == 2
    assert float(scraped['mbridge_sync_syncs_total{outcome="failed",run="test"}']) == 1
    assert float(scraped['mbridge_sync_retries_total{run="test"}']) == 1
    assert float(scraped['mbridge_sync_bytes_total{run="test"}']) == 2 * good.nbytes
    assert float(scraped['mbridge_sync_version{run="test"}']) == 2
    assert float(scraped['mbridge_sync_phase_seconds_count{phase="check",run="test"}']) == 3
    assert float(scraped[f'mbridge_sync_committed_info{{digest="{good.digest}",run="test",version="2"}}']) == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(path / "board")).Reload()
    assert [event.step for event in board.Scalars("sync/seconds")] == [1, 2, 3]
    assert [event.value for event in board.Scalars("sync/failed")] == [0, 0, 1]
    assert len(board.Scalars("sync/slowest/worker/load")) == 2


def test_a_record_that_is_being_written_is_left_out(recorded: Any, tmp_path: Path) -> None:
    path, _ = recorded
    text = (path / "syncs.jsonl").read_text()
    (tmp_path / "syncs.jsonl").write_text(text[: len(text) // 2])
    assert 1 <= len(read_syncs(tmp_path / "syncs.jsonl")) < 3
    with pytest.raises(BridgeError, match="has no complete record of a sync"):
        read_syncs(tmp_path / "nothing")


def test_the_page_has_a_timeline_of_every_notable_sync(recorded: Any, tmp_path: Path) -> None:
    path, (first, _) = recorded
    page = write_page(path, tmp_path / "page.html").read_text()
    assert_self_contained(page)
    titles = re.findall(r"<figcaption>Version (\d)", page)
    assert set(titles) == {"1", "2", "3"}
    assert len(titles) == 3
    assert "1 retries" in page
    assert "NonFiniteWeights: rank 0: 1 parameters hold NaN" in page
    labels = re.findall(r"text-anchor='end' font-size='12'>([^<]*)<", timeline(first["reports"][0]))
    engines = [f"engine {index}{worker}" for index in range(2) for worker in ("", " worker 0", " worker 1")]
    assert labels == ["rank 0", "rank 1", *engines]
    with pytest.raises(BridgeError, match="no sync of version 9 was recorded; there are 1 to 3"):
        write_page(path, tmp_path / "page.html", version=9)


def test_the_picture_is_a_png(recorded: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, _ = recorded
    runner = CliRunner().invoke(app, ["sync-report", str(path), "--output", str(tmp_path / "page.html"), "--png"])
    assert runner.exit_code == 0, runner.output
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["sync-report", str(tmp_path)])
    assert refused.exit_code == 1
    assert "has no complete record of a sync" in refused.output


def test_a_stopwatch_sums_what_takes_turns() -> None:
    watch = Stopwatch("rank 0")
    with watch("transfer"):
        for _ in range(3):
            with watch("pack"):
                pass
            with watch("wire"):
                pass
    pack, wire, transfer = watch.spans
    assert (pack.inside, wire.inside, transfer.inside) == ("transfer", "transfer", "")
    assert pack.start < wire.start < pack.end < wire.end
    assert pack.busy + wire.busy <= transfer.busy
    assert outermost(watch.spans, "rank 0") == {"transfer": transfer.busy}


def test_the_slowest_lane_counts_with_all_of_its_time() -> None:
    def load(lane: str, inside: str, seconds: float) -> Span:
        return Span(lane, "load", inside, 0.0, 9.0, seconds)

    spans = [load("engine 0 worker 0", "", 2.0), load("engine 0 worker 1", "", 1.0), load("engine 0 worker 1", "receive", 1.5)]
    assert slowest(spans) == {"worker": {"load": 2.5}}
