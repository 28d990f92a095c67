"""Streamed experts on the card's own code, over a driver without a card: bits, the order between two streams, memory, bad days.

The driver (fake_cuda.cpp) lets a stream that is waited for run ahead of the other unless an event forbids it: a copy that
does not wait for its buffer, or a layer that does not wait for its experts, gives other bits here.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver
from like_a_card import cpu_like_a_card

from kimi_lite.errors import DoesNotFitError, KimiLiteWarning
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import MOST_TOKENS, DeviceLostError, DeviceMemoryError
from kimi_lite.runtime.cuda.driver import PCIE_BYTES, Card
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import Plan, make_plan
from kimi_lite.runtime.speeds import ASSUMED, Speeds
from kimi_lite.runtime.weights import Weights, open_weights

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
CONTEXT = MOST_TOKENS + 34
SOME = ((), (0, 1, 2), (), (0, 2, 4, 6))  # the third layer that lacks experts takes the buffer of the first


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(NANO)


@pytest.fixture(scope="module")
def plan(weights: Weights) -> Plan:
    """Nano's own plan keeps all experts; this one keeps some and streams the rest."""
    sizes = sizes_of(weights)
    whole = make_plan(sizes, device="by hand", free=10**9, context=CONTEXT, speeds=Speeds())
    return replace(whole, resident=SOME, hit=(0.0, 3 / 8, 0.0, 1 / 2), stream_from=12)


@pytest.fixture
def card(fake: FakeDriver, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Engines get that plan on the driver's card."""
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: CudaDevice(fake.path))
    monkeypatch.setattr("kimi_lite.runtime.hybrid.make_plan", lambda *_, **__: plan)
    monkeypatch.setattr("kimi_lite.runtime.cuda.driver.PCIE_BYTES", 1 << 16)
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")
    yield fake
    gc.collect()
    fake.machine()


def engines(*, prove: bool = False) -> tuple[Engine, Engine]:
    card = Engine(NANO, context=CONTEXT, vram=10**9, prove=prove)
    assert isinstance(card.model, HybridModel)
    return card, cpu_like_a_card(CONTEXT)


def draw(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 800, n)]


def test_streamed_steps_have_the_bits_of_the_cpu(card: FakeDriver) -> None:
    before_all = card.used()
    engine, cpu = engines(prove=True)
    for seed, n in enumerate(
        (20, 1, 9, MOST_TOKENS + 2)
    ):  # streamed, decoded, shared with the CPU, streamed in two parts
        before = card.calls("cuStreamWaitEvent")
        assert engine.append(draw(seed, n)).tobytes() == cpu.append(draw(seed, n)).tobytes(), n
        # A layer that lacks experts waits for them, and they for their buffer.
        assert card.calls("cuStreamWaitEvent") - before == (2 * 3 if n >= 12 else 0)
    del engine
    gc.collect()
    assert card.used() == before_all


def test_a_context_shorter_than_a_step(card: FakeDriver, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    context = 100  # the buffers of a step are no longer than that
    short = replace(plan, context=context)
    monkeypatch.setattr("kimi_lite.runtime.hybrid.make_plan", lambda *_, **__: short)
    engine, cpu = Engine(NANO, context=context, vram=10**9), cpu_like_a_card(context)
    for seed, n in enumerate((70, 1, 9, 20)):  # streamed, decoded, shared with the CPU, streamed
        assert engine.append(draw(seed, n)).tobytes() == cpu.append(draw(seed, n)).tobytes(), n


def test_a_card_proves_streaming_by_its_first_layers_alone(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:  # as it does where a model has more layers than let a buffer be used twice
    monkeypatch.setattr("kimi_lite.runtime.hybrid._few_layers", lambda plan: 3)
    engine, cpu = engines(prove=True)
    ids = draw(5, 20)
    assert engine.append(ids).tobytes() == cpu.append(ids).tobytes()


def test_what_a_planner_is_told_is_what_is_taken(fake: FakeDriver, weights: Weights, plan: Plan) -> None:
    device = CudaDevice(fake.path)
    for index, layer in enumerate(weights.layers):
        device.load_layer(index, layer, plan.experts(index))
    device.load_ends(weights)
    taken = []
    for streams in (False, True, False):
        before = fake.used()
        device.reserve_cache(CONTEXT, streams=streams)
        taken.append(fake.used() - before)
    sizes = plan.sizes
    longer = sizes.workspace_bytes(CONTEXT, streams=True) - sizes.workspace_bytes(CONTEXT)
    # x, cos and sin of a second part.
    assert longer == MOST_TOKENS * (sizes.layers[0].D + sizes.shapes[0].R) * 4
    assert taken[1] == longer + sizes.stream_bytes(SOME) == -taken[2]
    device.close()


# ---- bad days


@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("cuMemcpyHtoDAsync_v2", 4),  # the start's four copies, then an expert's
        ("cuMemcpyHtoDAsync_v2", 11),
        ("cuEventSynchronize", 6),
        ("cuEventRecord", 7),
        ("cuStreamWaitEvent", 1),
        ("cuLaunchKernel", 40),
    ],
)
def test_a_copy_that_fails_in_mid_stream_costs_a_warning_and_no_bit(
    card: FakeDriver, function: str, after: int
) -> None:
    engine, cpu = engines()
    engine.append([1, 2, 3])
    cpu.append([1, 2, 3])
    card.fail(function, 719, after=after)
    with pytest.warns(
        KimiLiteWarning, match=r"paper card 0 failed .*719.*the CPU goes on and reads 3 tokens"
    ):
        logits_V = engine.append(draw(7, 14))
    assert isinstance(engine.model, CpuModel)
    assert logits_V.tobytes() == cpu.append(draw(7, 14)).tobytes()


def test_memory_short_for_the_buffers_leaves_nothing_behind(
    fake: FakeDriver, weights: Weights, plan: Plan
) -> None:
    device = CudaDevice(fake.path)
    for index, layer in enumerate(weights.layers):
        device.load_layer(index, layer, plan.experts(index))
    device.load_ends(weights)
    before = fake.used()
    fake.fail("cuMemAlloc_v2", 2, after=2)  # the cache and the working memory; then the buffers
    with pytest.raises(DeviceMemoryError, match="two buffers for experts of long prompts takes"):
        device.reserve_cache(CONTEXT, streams=True)
    assert fake.used() == before
    fake.fail("cuMemHostAlloc", 2, after=1)
    with pytest.raises(
        DeviceMemoryError, match=r"0\.1 MB of main memory cannot be pinned for it; close other"
    ):
        device.reserve_cache(CONTEXT, streams=True)
    assert fake.used() == before
    assert fake.calls("cuMemHostAlloc") - fake.calls("cuMemFreeHost") == 1  # the one that failed
    device.reserve_cache(CONTEXT, streams=True)
    device.close()
    assert fake.used() < before


def test_a_card_whose_buffers_never_fit_is_said_in_one_sentence(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = Card.allocate

    def short(self: Card, n_bytes: int, what: str) -> int:
        if "two buffers" in what:
            raise DeviceMemoryError("paper card 0: two buffers take 0.7 MB, 0.1 MB are free")
        return allocate(self, n_bytes, what)

    monkeypatch.setattr(Card, "allocate", short)
    before = card.used()
    with pytest.raises(DoesNotFitError, match=r"taken by another program.*two buffers.*--vram 0"):
        Engine(NANO, context=CONTEXT, vram=10**9)
    assert card.used() == before


def test_an_interrupted_copy_leaves_a_card_that_goes_on(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, cpu = engines()
    upload, n = Card.upload, 0

    def interrupted(self: Card, *arguments: object, aside: bool = False) -> None:
        nonlocal n
        n += aside
        if n == 9:
            raise KeyboardInterrupt
        upload(self, *arguments, aside=aside)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Card, "upload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.append(draw(1, 30))
    assert engine.append(draw(2, 30)).tobytes() == cpu.append(draw(2, 30)).tobytes()


# ---- PCIe


def test_pcie_is_measured_and_nothing_of_it_stays(fake: FakeDriver) -> None:
    device, before = CudaDevice(fake.path), fake.used()
    speeds = device.speeds()
    assert 0 < speeds.pcie_gb_s < 1000
    assert speeds.pcie_gb_s != ASSUMED.pcie_gb_s
    assert replace(speeds, pcie_gb_s=ASSUMED.pcie_gb_s) == ASSUMED
    assert fake.used() == before
    assert fake.calls("cuMemHostAlloc") == fake.calls("cuMemFreeHost") == 1
    fake.machine(memory=before + PCIE_BYTES - 1)  # where so little is free, the plan says so
    assert device.speeds() == ASSUMED
    fake.machine()
    fake.fail("cuStreamSynchronize", 719)
    with pytest.raises(DeviceLostError, match="CUDA error 719"):
        device.speeds()
    device.close()
