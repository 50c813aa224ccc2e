"""Copies of weights through pinned buffers, with buffers that a CPU emulates: each is read as late as it may be."""

from __future__ import annotations

import pytest
import torch

from nanovllm.utils import upload
from nanovllm.utils.upload import NUM_BUFFERS, Upload

CARD = torch.device("cuda")


class LateBuffer:
    """Keeps what is sent until it is waited for, and has one place for it, as pinned memory does."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._under_way: tuple[torch.Tensor, torch.Tensor] | None = None

    def send(self, values: torch.Tensor, target: torch.Tensor) -> None:
        assert 0 < target.nbytes <= self._num_bytes
        self.wait()
        self._under_way = (values.expand(target.shape).clone(), target)

    def wait(self) -> None:
        if self._under_way is not None:
            values, target = self._under_way
            target.copy_(values)
            self._under_way = None


@pytest.fixture(autouse=True)
def late_buffers(monkeypatch):
    monkeypatch.setattr(upload, "_Buffer", LateBuffer)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (64, 3), (100, 16), (2, 3, 4), (1, 4096), ()])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
def test_a_tensor_arrives_whole_and_converted(shape, stored):
    values = torch.randn(shape).to(stored)
    target = torch.full(shape, torch.nan)
    with Upload(CARD, buffer_bytes=128) as under_test:
        under_test.copy(values, target)
    assert torch.equal(target, values.float())


def test_many_tensors_share_the_buffers():
    values = [torch.randn(1 + i, 4) for i in range(10 * NUM_BUFFERS)]
    targets = [torch.full_like(value, torch.nan) for value in values]
    with Upload(CARD, buffer_bytes=64) as under_test:
        for value, target in zip(values, targets, strict=True):
            under_test.copy(value, target)
    for value, target in zip(values, targets, strict=True):
        assert torch.equal(target, value)


def test_parts_of_tensors_are_copied_to_parts_of_tensors():
    values, target = torch.randn(40, 12), torch.zeros(50, 12)
    with Upload(CARD, buffer_bytes=96) as under_test:
        under_test.copy(values[:, 6:], target[10:, :6])
    assert torch.equal(target[10:, :6], values[:, 6:])
    assert not target[:10].any()
    assert not target[:, 6:].any()


def test_what_is_under_way_is_waited_for_after_an_error_too():
    values, target = torch.randn(4, 4), torch.zeros(4, 4)

    def fail():
        with Upload(CARD, buffer_bytes=1024) as under_test:
            under_test.copy(values, target)
            under_test.copy(torch.zeros(3), torch.zeros(2))

    with pytest.raises(RuntimeError, match="expanded size"):
        fail()
    assert torch.equal(target, values)
