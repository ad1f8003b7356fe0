"""Where work over shards is computed: threads or processes here, or a Dask or Ray cluster, started or joined.

One pool or cluster serves a whole run; each step's flow gets a task runner that submits to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from data_pipeline.core.errors import UserError
from data_pipeline.core.processes import kill_workers, process_pool
from flows.engine.parts import Part, unfit, versions
from flows.recipe import RecipeRuntime

CONNECT_SECONDS = 10
DASK_EXAMPLE, RAY_EXAMPLE = "tcp://HOST:8786", "ray://HOST:10001"
RAY_STORE_BYTES = 128 << 20  # results are small; Ray's own default is a third of the memory
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def as_it_is(part: Part[Any, Any]) -> Callable[[], list[Any]]:
    return part


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Workers:
    """The workers that compute the parts of all steps of one run."""

    count: int
    """Parts that are computed at once."""

    task_runner: Callable[[], TaskRunner[Any]]
    """Makes the task runner of a step's flow."""

    prepare: Callable[[Part[Any, Any]], Callable[[], list[Any]]] = as_it_is
    """From a part, what a task is to call."""

    stop: Callable[[], None] = nothing
    """Ends what is being computed at once, where that can be; no more parts can be computed then."""


def reach(runtime: RecipeRuntime) -> None:
    """See that what a recipe asks for is installed, and that something answers at its address.

    Raises:
        UserError: it is not, or nothing does.
    """
    if runtime.task_runner == "dask":
        need("dask", "prefect_dask")
        if runtime.address:
            ask_scheduler(runtime.address)
    if runtime.task_runner == "ray":
        need("ray", "prefect_ray")
        if runtime.address and runtime.address != "auto":
            find_ray(runtime.address)


@contextmanager
def start_workers(runtime: RecipeRuntime, home: Path) -> Iterator[Workers]:
    """The workers that a recipe asks for. What was started here ends with the block, or when this process dies.

    Raises:
        UserError: the cluster at the address can't serve this run.
    """
    start = {"threads": threads, "processes": processes, "dask": dask, "ray": ray}[runtime.task_runner]
    with start(runtime, home) as workers:
        yield workers


@contextmanager
def threads(runtime: RecipeRuntime, home: Path) -> Iterator[Workers]:
    count = runtime.worker_count
    yield Workers(count, partial(ThreadPoolTaskRunner, count))


@contextmanager
def processes(runtime: RecipeRuntime, home: Path) -> Iterator[Workers]:
    """A pool of local processes; a task waits in a thread, so that the workers need not know Prefect."""
    count = runtime.worker_count
    with process_pool(count) as pool:
        yield Workers(
            count=count,
            task_runner=partial(ThreadPoolTaskRunner, count),
            prepare=lambda part: lambda: pool.submit(part).result(),
            stop=partial(kill_workers, pool),
        )


@contextmanager
def dask(runtime: RecipeRuntime, home: Path) -> Iterator[Workers]:
    """A cluster of local processes, or the one whose scheduler is at ``runtime.address``."""
    import distributed
    from prefect_dask import DaskTaskRunner

    with ExitStack() as stack:
        address = runtime.address
        if not address:
            cluster = distributed.LocalCluster(
                n_workers=runtime.worker_count,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,  # no killing of workers: a step's own settings bound what it needs
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
                preload="flows.engine.parts",
            )
            address = stack.enter_context(cluster).scheduler_address
        count = sum(worker["nthreads"] for worker in ask_scheduler(address)["workers"].values())
        if not count:
            raise UserError(f"runtime.address: the Dask cluster at {address} has no workers: start some")
        with distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            check(home, address, lambda *arguments: client.run(unfit, *arguments).items())
        yield Workers(count, partial(DaskTaskRunner, address=address))


def ask_scheduler(address: str) -> dict[str, Any]:
    """Ask what a Dask scheduler reports of itself and its workers."""
    import distributed

    async def ask() -> dict[str, Any]:
        async with distributed.rpc(address) as scheduler:
            return await asyncio.wait_for(scheduler.identity(), CONNECT_SECONDS)

    try:
        return asyncio.run(ask())
    except Exception as error:  # whatever else listens there may answer anything
        raise no_answer("Dask scheduler", address, DASK_EXAMPLE, error) from None


@contextmanager
def ray(runtime: RecipeRuntime, home: Path) -> Iterator[Workers]:
    """Local processes, or the cluster at ``runtime.address`` (``ray://HOST:10001``, ``HOST:6379``, ``auto``)."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from prefect_ray import RayTaskRunner

    try:
        join_ray(runtime)
        address = runtime.address or "this machine"
        count = int(ray.cluster_resources().get("CPU", 0))
        if not count:
            raise UserError(f"runtime.address: the Ray cluster at {address} has no CPUs for tasks")
        check(home, address, ask_ray_nodes)
        yield Workers(count, RayTaskRunner)  # finds Ray initialised, so it neither starts nor ends one
    finally:
        ray.shutdown()


def join_ray(runtime: RecipeRuntime) -> None:
    """Initialise Ray in this process: connected to the cluster at the address, or to a new one of local processes."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if not runtime.address:
        ray.init(
            num_cpus=runtime.worker_count,
            include_dashboard=False,
            object_store_memory=RAY_STORE_BYTES,
            **quiet,
        )
        return
    try:
        ray.init(runtime.address, **quiet)
    except Exception as error:  # grpc's own errors, among others
        lacks = "" if "RAY_AUTH_MODE" in os.environ else "; if it asks for a token, set RAY_AUTH_MODE=token"
        raise UserError(f"{no_answer('Ray cluster', runtime.address, RAY_EXAMPLE, error)}{lacks}") from None


def ask_ray_nodes(*arguments: Any) -> Iterable[tuple[str, str]]:
    """`unfit`, asked once on every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    ask = ray.remote(unfit)
    answers = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        )
        for node in nodes
    ]
    return zip((node["NodeManagerAddress"] for node in nodes), ray.get(answers), strict=True)


def find_ray(address: str) -> None:
    """See that something at ``ray://HOST:PORT`` or ``HOST:PORT`` speaks gRPC: Ray itself would try for minutes."""
    import grpc  # type: ignore[import-untyped]

    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if not parts.hostname or not parts.port:
            raise ValueError("it names no host and port")
        with grpc.insecure_channel(f"{parts.hostname}:{parts.port}") as channel:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
    except (ValueError, grpc.FutureTimeoutError) as error:
        raise no_answer("Ray cluster", address, RAY_EXAMPLE, error) from None


def need(extra: str, module: str) -> None:
    """Refuse a task runner whose libraries are not there."""
    if find_spec(module) is None:
        raise UserError(
            f"runtime.task_runner: {extra} needs libraries that are not installed: pip install 'llmill[{extra}]'"
        )


def no_answer(what: str, address: str, example: str, error: Exception) -> UserError:
    """``example`` is for an address that is none; ``error`` may have no message, or a long one."""
    reason = (str(error) or f"no answer in {CONNECT_SECONDS} s").splitlines()[0][:160]
    return UserError(f"runtime.address: no {what} at {address} (write it as {example}): {reason}")


def check(home: Path, address: str, ask: Callable[..., Iterable[tuple[str, str]]]) -> None:
    """Ask every worker whether it can serve this run, before anything is computed.

    Raises:
        UserError: one can't, or has no llmill to ask.
    """
    seen = home / f".seen-{secrets.token_hex(4)}.tmp"
    seen.touch()
    try:
        for worker, fault in ask(seen, PREFECT_API_URL.value(), versions()):
            if fault:
                raise UserError(f"runtime.address: worker {worker} of {address} {fault}")
    except ImportError as error:
        raise UserError(f"runtime.address: a worker of {address} has no llmill: {error}") from None
    finally:
        seen.unlink()
