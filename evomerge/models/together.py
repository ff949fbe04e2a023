"""Builds several tensors of a model at the same time, each by a thread of its own."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

#: Most tensors that are built at the same time. More would not be faster (Python and the memory are shared), and each
#: takes memory.
MOST = 4


def fitting() -> int:
    """Return how many tensors to build at the same time: the threads that there are, up to `MOST`."""
    return min(torch.get_num_threads(), MOST)


def together(build: Callable[[str], Tensor], names: Iterable[str], count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name as soon as it is finished; no more than `count` are there at once.

    A line of many small operations gains more by that than by splitting each operation among the threads, and no
    thread waits for another one that some other program holds up. Meanwhile an operation of torch has its share of
    the threads.

    Args:
        build: returns a tensor; called by several threads at once.
        names: of the tensors, in the order in which they are begun.
        count: how many are built at once.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    waiting: dict[Future[Tensor], str] = {}
    pool = ThreadPoolExecutor(count)
    try:
        for name in names:
            while len(waiting) == count:
                yield from _finished(waiting)
            waiting[pool.submit(build, name)] = name
        while waiting:
            yield from _finished(waiting)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _finished(waiting: dict[Future[Tensor], str]) -> Iterator[tuple[str, Tensor]]:
    """Wait until a tensor is finished, and yield those that are; they are forgotten here."""
    for each in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(each), each.result()
