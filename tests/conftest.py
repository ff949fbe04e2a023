"""What every test relies on: no network, one thread, no chatter. Set before anything heavy is imported."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Hold torch to one thread, where a test has imported it: some code under test sets another number."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One local Ray for all pools of a file."""
    import ray

    ray.init(
        "local",  # whatever else runs on this machine
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()
