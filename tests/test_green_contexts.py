"""SM partitions against a driver of our own: what is asked of it, what its answers become, and that nothing leaks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest

from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.scheduling.pipeline_plan import Lane
from nanovllm.errors import ConfigError, GreenContextError
from nanovllm.utils import green_ctx
from nanovllm.utils.device import Device


@dataclass(frozen=True)
class Sms:
    smCount: int  # noqa: N815 - as the driver spells it


class Code(int):
    name = "CUDA_ERROR_INJECTED"


class FakeDriver:
    """132 SMs, granted in multiples of 8; a call whose number is in `failing` fails."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: set[str] = set()
        self.contexts: set[int] = set()
        self.streams: set[int] = set()
        self._next = 100

    def _answer(self, call, *values):
        self.calls.append(call)
        return (Code(call in self.failing), *values)

    def cuInit(self, flags):  # noqa: N802
        return self._answer("cuInit")

    def cuDeviceGet(self, index):  # noqa: N802
        return self._answer("cuDeviceGet", f"device {index}")

    def cuDeviceGetDevResource(self, device, kind):  # noqa: N802
        return self._answer("cuDeviceGetDevResource", SimpleNamespace(sm=Sms(132)))

    def cuDevSmResourceSplitByCount(self, groups, resource, flags, count):  # noqa: N802
        granted = -(-count // 8) * 8
        rest = SimpleNamespace(sm=Sms(resource.sm.smCount - granted))
        return self._answer("cuDevSmResourceSplitByCount", [SimpleNamespace(sm=Sms(granted))], 1, rest)

    def cuDevResourceGenerateDesc(self, resources, count):  # noqa: N802
        return self._answer("cuDevResourceGenerateDesc", resources[0])

    def cuGreenCtxCreate(self, description, device, flags):  # noqa: N802
        self._next += 1
        if "cuGreenCtxCreate" not in self.failing:
            self.contexts.add(self._next)
        return self._answer("cuGreenCtxCreate", self._next)

    def cuGreenCtxStreamCreate(self, context, flags, priority):  # noqa: N802
        self._next += 1
        if "cuGreenCtxStreamCreate" not in self.failing:
            self.streams.add(self._next)
        return self._answer("cuGreenCtxStreamCreate", self._next)

    def cuStreamDestroy(self, stream):  # noqa: N802
        self.streams.remove(stream)
        return self._answer("cuStreamDestroy")

    def cuGreenCtxDestroy(self, context):  # noqa: N802
        self.contexts.remove(context)
        return self._answer("cuGreenCtxDestroy")


@pytest.fixture
def driver(monkeypatch):
    driver, bindings = FakeDriver(), ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return driver


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        ([48, 84], [48, 84]),
        ([32, 100], [32, 100]),
        ([100], [104]),
        ([16, 16], [16, 16]),
        ([12, 116], [16, 116]),
        ([36, 96], [36, 96]),
        ([28, 104], [28, 104]),
    ],
)
def test_counts_are_rounded_up_but_for_all_that_is_left(driver, asked, granted):
    partitions = green_ctx.split_device_green_ctx_by_sm_count(0, asked)
    assert [partition.num_sms for partition in partitions] == granted
    assert len({partition.stream for partition in partitions}) == len(asked)
    green_ctx.destroy(partitions)
    assert not driver.streams
    assert not driver.contexts


def test_more_than_there_is_names_what_is_left(driver):
    with pytest.raises(
        GreenContextError, match=r"\[100, 40\] SMs of GPU 0 were asked for; after \[104\] only 28 are left"
    ):
        green_ctx.split_device_green_ctx_by_sm_count(0, [100, 40])
    assert not driver.contexts


@pytest.mark.parametrize(
    "call", ["cuInit", "cuDevSmResourceSplitByCount", "cuDevResourceGenerateDesc", "cuGreenCtxStreamCreate"]
)
def test_a_driver_call_that_fails_is_named_and_leaves_nothing_behind(driver, call):
    driver.failing.add(call)
    with pytest.raises(GreenContextError, match=rf"{call} failed for .*: CUDA_ERROR_INJECTED \(1\)"):
        green_ctx.split_device_green_ctx_by_sm_count(0, [48, 84])
    assert not driver.contexts
    assert not driver.streams


def test_what_the_driver_lacks_is_an_error_of_this_package(driver, monkeypatch):
    def missing(*args):
        raise RuntimeError('Function "cuGreenCtxCreate" not found')

    monkeypatch.setattr(driver, "cuGreenCtxCreate", missing)
    with pytest.raises(GreenContextError, match='cuGreenCtxCreate cannot be called: Function "cuGreenCtxCreate" not'):
        green_ctx.split_device_green_ctx_by_sm_count(0, [48, 84])
    assert not driver.contexts


def test_without_cuda_python_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenContextError, match="pip install cuda-python"):
        green_ctx.count_sms(0)


class TestManager:
    @pytest.fixture(autouse=True)
    def without_a_gpu(self, driver, monkeypatch):
        self.driver = driver
        stream = SimpleNamespace(ExternalStream=lambda handle, device: handle)
        fake_cuda = SimpleNamespace(
            **vars(stream), current_stream=lambda: None, synchronize=lambda index: None, device=self.nothing
        )
        monkeypatch.setattr("nanovllm.engine.green_manager.torch", SimpleNamespace(cuda=fake_cuda))
        monkeypatch.setattr(Device, "current", lambda device: self.nothing())

    class nothing:  # noqa: N801 - a context
        def __init__(self, *args):
            self.args = args

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    def manager(self, attention_sm=None, ffn_sm=None, **options):
        return GreenManager(Device("cuda", 0), attention_sm, ffn_sm, **options)

    def test_what_is_not_given_is_what_is_left(self):
        assert self.manager().split == (32, 100)
        assert self.manager(32).split == (32, 100)
        assert self.manager(None, 84).split == (48, 84)

    def test_counts_beyond_the_card_are_refused(self):
        with pytest.raises(ConfigError, match="100 SMs for attention and 40 for the FFN are more than the 132"):
            self.manager(100, 40)

    def test_a_split_that_is_not_granted_names_the_one_that_is(self):
        with pytest.raises(GreenContextError, match="asked for 44 and 84 SMs and grants 48 and 84"):
            self.manager(44, 84).allocate()
        assert not self.driver.contexts
        assert self.manager(44, 88).allocate().split == (44, 88)

    def test_idle_sms_are_warned_of(self, caplog):
        manager = self.manager(16, 16)
        manager.allocate()
        assert "100 of 132 SMs are idle" in caplog.text
        assert manager.stats()["idle_sm"] == 100

    def test_splits_are_kept_and_nothing_leaks_over_a_thousand_rebalances(self):
        manager = self.manager(enable_rebalance=True)
        first = manager.allocate()
        for turn in range(1000):
            lanes = manager.rebalance(*[(40, 92), (48, 84), (64, 68)][turn % 3])
            assert set(lanes.streams) == set(Lane)
        assert manager.allocate((32, 100)) is first
        assert len(self.driver.contexts) == 8
        assert manager.stats() == {
            "num_sms": 132,
            "attention_sm": 40,
            "ffn_sm": 92,
            "idle_sm": 0,
            "splits_held": 4,
            "rebalances": 1000,
        }
        manager.close()
        assert not self.driver.contexts

    def test_a_rebalance_that_fails_keeps_the_split(self):
        manager = self.manager(enable_rebalance=True)
        manager.allocate()
        self.driver.failing.add("cuGreenCtxCreate")
        with pytest.raises(GreenContextError):
            manager.rebalance(64, 68)
        assert manager.split == (32, 100)
        assert manager.stats()["rebalances"] == 0
