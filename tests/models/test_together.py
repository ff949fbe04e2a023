"""Tensors that are built at the same time: each comes once, few are there at once, a failure ends all."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from evomerge.models.together import MOST, fitting, together


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Give torch five threads for a test, and its own number back after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield 5
    torch.set_num_threads(before)


NAMES = [str(i) for i in range(20)]


def test_every_tensor_comes_once_with_its_name() -> None:
    """Twenty names give twenty tensors, whatever the number of threads."""
    for count in (1, 2, 4, 30):
        found = list(together(lambda name: torch.tensor(int(name)), NAMES, count))

        assert sorted((int(name), int(tensor)) for name, tensor in found) == [(i, i) for i in range(20)]


def test_tensors_are_built_at_the_same_time() -> None:
    """Two tensors that wait for each other are both finished."""
    meeting = threading.Barrier(2, timeout=10)

    def build(name: str) -> Tensor:
        meeting.wait()
        return torch.zeros(1)

    assert len(list(together(build, NAMES, 2))) == 20


def test_no_more_are_there_than_were_allowed() -> None:
    """Of those begun at most three were not handed out yet."""
    begun: list[str] = []

    def build(name: str) -> Tensor:
        begun.append(name)
        return torch.zeros(1)

    for taken, _ in enumerate(together(build, NAMES, 3)):
        assert len(begun) - taken <= 3


def test_operations_have_their_share_of_the_threads(threads: int) -> None:
    """Two of five for each of two tensors, one where there are more tensors than threads; all afterwards."""
    for count, share in ((2, 2), (4, 1), (9, 1)):
        found = together(lambda name: torch.tensor(torch.get_num_threads()), NAMES, count)

        assert {int(tensor) for _, tensor in found} == {share}
        assert torch.get_num_threads() == threads
    assert fitting() == MOST == 4
    torch.set_num_threads(2)
    assert fitting() == 2


def test_a_failure_ends_all(threads: int) -> None:
    """It is raised where the tensors are taken, the tensors after it are not begun, and the threads are as before."""
    begun: list[str] = []

    def build(name: str) -> Tensor:
        begun.append(name)
        if name == "3":
            raise ValueError("no")
        return torch.zeros(1)

    with pytest.raises(ValueError, match="no"):
        list(together(build, NAMES, 2))

    assert len(begun) < 8
    assert torch.get_num_threads() == threads
