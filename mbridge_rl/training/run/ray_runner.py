"""A run on Ray: trainer ranks, engines and reward workers are actors in one placement group. No torchrun is needed.

The driver owns the trainer ranks; the first rank owns engines and reward workers, so that nothing outlives it. A rank that
dies ends all ranks (`LaunchError`), and the run goes on from its last checkpoint where `runner.restarts` allows it; an engine
that dies is replaced by the fleet while the ranks live on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.rendezvous import LOOPBACK, new_secret, require_members, serve_store
from mbridge_rl.sync.vllm.engines.ray_actor import RayEngine, import_ray
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.launcher import LaunchError
from mbridge_rl.training.run.ray_judge import make_ray_judge

_OBJECT_STORE_BYTES = 256 << 20  # of a local cluster: weights do not pass through it
_ROOM_SECONDS = 60.0  # until a cluster must have found room


def launch_on_ray(config: RunConfig, *, resume: bool) -> dict[str, Any]:
    """Does the same as `launcher.launch(train_rank, ...)` with actors; starts a cluster on this machine if `runner.address` is
    `None`.

    Raises:
        ConfigError: the cluster cannot hold the actors.
        LaunchError: a rank failed or was lost.
        ImportError: Ray is missing.
    """
    ray = import_ray()
    bundles = _bundles(config)
    own_cluster = not ray.is_initialized()
    if own_cluster:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {
            "num_cpus": max(os.cpu_count() or 1, int(sum(bundle["CPU"] for bundle in bundles)) + 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        ray.init(config.runner.address, **({} if config.runner.address else local), logging_level="warning")
    group, ranks = None, []
    try:
        group = _placement_group(ray, bundles)
        ranks = [_start_rank(ray, config, group, rank) for rank in range(config.layout.world_size)]
        rendezvous = _rendezvous(ray, ranks)
        calls = [rank.run.remote(config, resume, rendezvous, group) for rank in ranks]
        return _results(ray, calls)[0]
    finally:
        for rank in ranks:
            ray.kill(rank)
        if group is not None:
            ray.util.remove_placement_group(group)
        if own_cluster:
            ray.shutdown()


@dataclass(frozen=True)
class Rendezvous:
    """The address where trainer ranks meet, and the secret by which they recognize each other."""

    address: str
    port: int
    secret: str


class TrainerRank:
    """An actor that runs one trainer rank."""

    def __init__(self, rank: int, world_size: int, threads: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")  # Ray shows it its own device only
        torch.set_num_threads(threads)
        self._rank, self._world_size = rank, world_size

    def where(self) -> tuple[str, str]:
        """The id and the address of this rank's node."""
        ray = import_ray()
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def serve(self, address: str) -> Rendezvous:
        """Opens the store where the ranks meet, at this address of this rank's node only."""
        self._store = serve_store(address)
        return Rendezvous(address, self._store.port, new_secret())

    def run(self, config: RunConfig, resume: bool, rendezvous: Rendezvous, group: Any) -> dict[str, Any]:
        from mbridge_rl.training.run.rank import train_rank

        if rendezvous.address == LOOPBACK:
            os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
        timeout = timedelta(seconds=config.engine.call_timeout + config.engine.start_timeout)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.TCPStore(rendezvous.address, rendezvous.port, is_master=False, timeout=timeout),
            rank=self._rank,
            world_size=self._world_size,
            timeout=timeout,
        )
        require_members(RankGroup().gather_plain, self._rank, rendezvous.secret, "of the trainer")
        make_engine = partial(start_engine_actor, group=group)
        return train_rank(config, resume, make_engine, make_ray_judge)


def start_engine_actor(config: RunConfig, index: int, *, group: Any) -> RayEngine:
    """Starts engine `index` in its bundle of the placement group; returns before it is up."""
    from mbridge_rl.training.run.engines import engine_arguments, engine_directory

    engine = config.engine
    gpus = engine.tensor_parallel_size * _gpu_share(config) if torch.cuda.is_available() else 0
    bundle = index % config.layout.world_size if _colocated(config) else config.layout.world_size + index
    return RayEngine.start(
        engine_directory(config),
        threads=engine.threads,
        ray_options={
            "num_cpus": config.runner.cpus_per_engine,
            "num_gpus": gpus,
            "scheduling_strategy": _at(group, bundle),
        },
        start_timeout=engine.start_timeout,
        call_timeout=engine.call_timeout,
        **engine_arguments(config),
    )


def _colocated(config: RunConfig) -> bool:
    return config.runner.placement == "colocated"


def _gpu_share(config: RunConfig) -> float:
    """The share of a device that Ray reserves for a rank or for a worker of an engine."""
    return 0.5 if _colocated(config) else 1.0


def _bundles(config: RunConfig) -> list[dict[str, float]]:
    """The resources that the placement group reserves: a bundle per rank, then one per engine unless engines share the
    ranks'."""
    runner, engine = config.runner, config.engine
    on_gpu = torch.cuda.is_available()
    if _colocated(config) and (engine.count > config.layout.world_size or (on_gpu and engine.tensor_parallel_size > 1)):
        raise ConfigError(
            f"runner.placement=colocated puts each engine on one rank's device: {engine.count} engines of "
            f"{engine.tensor_parallel_size} workers do not fit on {config.layout.world_size} ranks; use separate"
        )
    rank = {"CPU": runner.cpus_per_rank + (runner.cpus_per_engine if _colocated(config) else 0.0)}
    bundles = [rank | ({"GPU": 1.0} if on_gpu else {}) for _ in range(config.layout.world_size)]
    if not _colocated(config):
        devices = {"GPU": float(engine.tensor_parallel_size)} if on_gpu else {}
        bundles += [{"CPU": runner.cpus_per_engine, **devices} for _ in range(engine.count)]
    return bundles


def _placement_group(ray: Any, bundles: list[dict[str, float]]) -> Any:
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=_ROOM_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"the Ray cluster has no place for {bundles} within {_ROOM_SECONDS:g} s; it has {ray.cluster_resources()}, of "
            f"which {ray.available_resources()} are free"
        ) from error
    return group


def _start_rank(ray: Any, config: RunConfig, group: Any, rank: int) -> Any:
    gpus = _gpu_share(config) if torch.cuda.is_available() else 0
    actor = ray.remote(TrainerRank).options(
        num_cpus=config.runner.cpus_per_rank, num_gpus=gpus, scheduling_strategy=_at(group, rank)
    )
    return actor.remote(rank, config.layout.world_size, config.runner.threads)


def _at(group: Any, bundle: int) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _rendezvous(ray: Any, ranks: Sequence[Any]) -> Rendezvous:
    """Opens the ranks' meeting place: on the loopback if all ranks are on one node."""
    try:
        places = ray.get([rank.where.remote() for rank in ranks])
        one_node = len({node for node, _ in places}) == 1
        return ray.get(ranks[0].serve.remote(LOOPBACK if one_node else places[0][1]))
    except ray.exceptions.RayError as error:
        raise LaunchError(f"a trainer rank could not be started: {error}") from error


def _results(ray: Any, calls: Sequence[Any]) -> list[Any]:
    """The result of every rank; raises as soon as one rank fails."""
    waiting = list(calls)
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            raise LaunchError(f"rank {list(calls).index(ready)} of {len(calls)} failed:\n{error}") from error
    return ray.get(list(calls))
