"""The Ray that a pool works in: started here, or one that runs already; and what fits into it."""

import math
import os
import socket
from typing import Any

from evomerge.errors import EvomergeError

#: Object store of a Ray that is started here, in bytes: jobs and answers are small, and workers map sources themselves.
_STORE = 100 * 2**20
#: Seconds in which a cluster must be reached.
_KNOCK = 10.0


def connect(address: str, cpus: int | None, gpus: bool) -> bool:
    """Start Ray or connect to it, unless this process has it already; tell whether it is ours to stop.

    Args:
        address: `local` starts one on this machine; `auto` is the one that runs (RAY_ADDRESS, or what `ray start`
            started on this machine); otherwise HOST:PORT.
        cpus: the processors that a local one has to give; None: those of the machine.
        gpus: whether a local one gives the GPUs of the machine.

    Raises:
        EvomergeError: if there is none at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        none: dict[str, Any] = {} if gpus else {"num_gpus": 0}
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE, **none, **quiet)
        return True
    try:
        _knock(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as problem:
        raise EvomergeError(
            f"ray.address {address}: no Ray can be reached there ({_brief(problem)}); start one with "
            "`ray start --head`, run this program on a node of the cluster and with its token, or set ray.address to "
            "local"
        ) from None
    return True


def living() -> dict[str, float]:
    """Return the number of GPUs of each node that lives, by Ray's name of it."""
    import ray

    nodes: Any = ray.nodes  # carries no types
    return {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in nodes() if node["Alive"]}


def memories() -> list[tuple[str, int]]:
    """Return name and bytes of memory for workers, as Ray counts them, of each node that lives."""
    import ray

    nodes: Any = ray.nodes  # carries no types
    return [(node["NodeName"], int(node["Resources"].get("memory", 0))) for node in nodes() if node["Alive"]]


def capacity(gpus: float) -> int:
    """Return how many workers fit the GPUs of the cluster, when each takes `gpus` of them.

    Ray gives a worker whole GPUs, or a share of one.
    """
    each = math.floor(1 / gpus + 1e-9) if gpus < 1 else 1 / gpus
    return sum(math.floor(count * each + 1e-9) for count in living().values())


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()


def _brief(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:120] or type(problem).__name__
