"""Long prompts whose experts are streamed to the card: the bits of the CPU engine, the planner's choice, its predictions, bad days.

Nano's working memory is larger than all its experts, so plans that stream are made by hand here, except where the planner
is what is tested: on the published sizes, and on nano with a context that needs no longer steps.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from like_a_card import cpu_like_a_card
from numpy.typing import NDArray

import kimi_lite
from kimi_lite.api import nano_path
from kimi_lite.errors import KimiLiteWarning
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.device import MOST_TOKENS, DeviceLostError, DeviceMemoryError, DeviceWrongError
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import MARGIN, Plan, make_plan, predict
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.weights import Weights, open_weights

CONTEXT = 2200
CARD = 100_000_000
LONG = MOST_TOKENS + 44  # tokens that a device takes in two parts
SLOW_CPU = Speeds(cpu_gb_s=0.5, cpu_gmac_s=2)  # on which nano's experts are worth streaming
NONE, SOME = ((), (), (), ()), ((), (0, 1, 2), (4, 5, 6), (0, 7))
UNEVEN = (
    (),
    tuple(range(8)),
    (),
    (0, 1, 2, 3, 4, 5, 6),
)  # a whole layer between: its neighbour's experts wait longer


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(nano_path())


def by_hand(
    weights: Weights, resident: tuple[tuple[int, ...], ...], stream_from: int | None, context: int = CONTEXT
) -> Plan:
    """A plan with these experts on the card."""
    sizes = sizes_of(weights)
    plan = make_plan(sizes, device="by hand", free=CARD, context=context, speeds=Speeds())
    assert plan.whole
    longer = sizes.workspace_bytes(context, streams=True) - sizes.workspace_bytes(context)
    hit = tuple(
        len(experts) / max(1, layer.n_experts) for experts, layer in zip(resident, sizes.layers, strict=True)
    )
    stream_bytes = 0 if stream_from is None else longer + sizes.stream_bytes(resident)
    return replace(plan, resident=resident, hit=hit, stream_from=stream_from, stream_bytes=stream_bytes)


def carried_out(monkeypatch: pytest.MonkeyPatch, plan: Plan, device: Callable[[], SimulatedDevice]) -> None:
    """Engines get this plan on such a card."""
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", device)
    monkeypatch.setattr("kimi_lite.runtime.hybrid.make_plan", lambda *_, **__: plan)


class Watched(SimulatedDevice):
    """Remembers which layers' experts were brought, and between which layers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.events: list[str] = []

    def bring(self, index: int) -> None:
        self.events.append(f"bring {index}")
        super().bring(index)

    def run_layer(self, index: int) -> None:
        self.events.append(f"run {index}")
        super().run_layer(index)


def prompt(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 800, n)]


def ids(seed: int, n: int) -> NDArray[np.int32]:
    return np.asarray(prompt(seed, n), np.int32)


# ---- the bits


@pytest.mark.parametrize("resident", [NONE, SOME, UNEVEN])
@pytest.mark.parametrize("stream_from", [2, LONG - 10, None])
def test_prompts_in_any_cut_have_the_bits_of_the_cpu(
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    resident: tuple[tuple[int, ...], ...],
    stream_from: int | None,
) -> None:
    carried_out(monkeypatch, by_hand(weights, resident, stream_from), lambda: SimulatedDevice(CARD))
    hybrid, cpu = Engine(nano_path(), context=CONTEXT, vram=CARD), cpu_like_a_card(CONTEXT)
    # Within, at and beyond a group of 32 positions and what a device works on at once; then one by one.
    for seed, n in enumerate([1, LONG, 31, MOST_TOKENS, 2 * MOST_TOKENS + 1, 1, 1]):
        assert np.array_equal(hybrid.append(prompt(seed, n)), cpu.append(prompt(seed, n))), (seed, n)
    for keep in (350, 17):
        hybrid.rewind(keep)
        cpu.rewind(keep)
        again = prompt(keep, LONG + 30)
        assert np.array_equal(hybrid.append(again), cpu.append(again)), keep


def test_experts_come_one_layer_ahead_and_decoding_brings_none(weights: Weights) -> None:
    for resident, expected in (
        (NONE, "run 0, bring 1, run 1, bring 2, run 2, bring 3, run 3"),
        (UNEVEN, "run 0, run 1, bring 2, run 2, bring 3, run 3"),
    ):
        plan = by_hand(weights, resident, 40)
        device = Watched(CARD)
        model = HybridModel(weights, device, plan)
        assert CARD - device.free_bytes() == (
            plan.sizes.fixed_bytes
            + plan.experts_bytes
            + plan.cache_bytes
            + plan.sizes.workspace_bytes(CONTEXT)
            + plan.stream_bytes
        )
        before = device.free_bytes()
        model.forward(ids(1, 40))
        assert ", ".join(device.events) == expected
        device.events.clear()
        for n in (39, 1, 1):
            model.forward(ids(n, n))
        assert device.events == []
        assert device.free_bytes() == before  # nothing on the card made room


def test_a_step_is_as_long_as_streaming_allows(weights: Weights) -> None:
    plan, most = by_hand(weights, NONE, LONG, context=8000), MOST_TOKENS
    lengths = (1, most - 1, LONG - 1, LONG, 2048, 5000)
    assert [plan.step(n) for n in lengths] == [1, most - 1, most, LONG, 2048, 2048]
    assert [replace(plan, stream_from=None).step(n) for n in (1, LONG, 5000)] == [1, most, most]


def test_a_picture_in_a_streamed_prompt_is_seen_as_on_the_cpu(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disc, question = tmp_path / "disc.png", "What colour is it?"
    scene("red", "circle", 1, (3, 3), np.random.default_rng(0))[0].save(disc)
    expected = kimi_lite.load(context=CONTEXT, vram=0).ask(question, images=[disc])
    device = Watched(CARD)
    carried_out(monkeypatch, by_hand(weights, SOME, 2), lambda: device)
    answer = kimi_lite.load(context=CONTEXT, vram=CARD).ask(question, images=[disc])
    assert (answer.text, answer.thinking) == (expected.text, expected.thinking)
    assert "run 3" in device.events


# ---- bad days


# A streamed step of two parts through nano: 4 layers of 4 pieces for each part, 3 times experts, and the head.
@pytest.mark.parametrize("lost_after", [0, 8, 9, 18, 20, 35])
def test_a_card_that_fails_in_mid_stream_costs_a_warning_and_no_bit(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, lost_after: int
) -> None:
    plan = by_hand(weights, SOME, 200)
    carried_out(monkeypatch, plan, lambda: SimulatedDevice(CARD))
    engine, cpu = Engine(nano_path(), context=CONTEXT, vram=CARD), cpu_like_a_card(CONTEXT)
    assert isinstance(engine.model, HybridModel)
    device = engine.model.device
    assert isinstance(device, SimulatedDevice)
    engine.append(prompt(1, 30))
    cpu.append(prompt(1, 30))
    device._lost_after = lost_after
    with pytest.warns(KimiLiteWarning, match="does not answer any more; the CPU goes on and reads 30 tokens"):
        logits_V = engine.append(prompt(2, LONG))
    assert np.array_equal(logits_V, cpu.append(prompt(2, LONG)))
    assert isinstance(engine.model, CpuModel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(engine.append(prompt(3, 600)), cpu.append(prompt(3, 600)))


def test_an_interrupted_stream_leaves_a_card_that_goes_on(weights: Weights) -> None:
    class Interrupted(SimulatedDevice):
        armed = False

        def bring(self, index: int) -> None:
            super().bring(index)
            if self.armed and index == 2:
                raise KeyboardInterrupt

    device, cpu = Interrupted(CARD), CpuModel(weights, CONTEXT, expanded=False)
    model = HybridModel(weights, device, by_hand(weights, NONE, 2))
    device.armed = True
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids(1, LONG))
    device.armed = False
    assert np.array_equal(model.forward(ids(2, LONG)), cpu.forward(ids(2, LONG)))


def test_streamed_experts_are_part_of_a_cards_proof(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(SimulatedDevice):
        """The third layer that lacks experts goes wrong, the first whose buffer was used before."""

        def run_layer(self, index: int) -> None:
            super().run_layer(index)
            if index == 3:
                self._x_TD[-1, 7] += 1  # less could vanish where activations are rounded

    plan = by_hand(weights, NONE, 1000)
    carried_out(monkeypatch, plan, lambda: Wrong(CARD))
    with pytest.raises(DeviceWrongError, match="computes other values than the CPU"):
        Engine(nano_path(), context=CONTEXT, vram=CARD)
    for context in (1, 5):  # a proof is as long as there is room
        carried_out(monkeypatch, replace(plan, context=context), lambda: SimulatedDevice(CARD))
        engine = Engine(nano_path(), context=context, vram=CARD)
        assert isinstance(engine.model, HybridModel)
        assert engine.model.n == 0


def test_memory_short_for_the_buffers_is_planned_around(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, context = sizes_of(weights), 256  # which needs no longer steps, so that nano's plan may stream
    one = sizes.layers[-1].expert_bytes
    fixed = sizes.fixed_bytes + sizes.cache_bytes(context) + sizes.workspace_bytes(context)
    cap = round((fixed + 20.5 * one) / (1 - MARGIN))
    # On nano the buffers take a third of all experts' place: worth it for a short answer only.
    monkeypatch.setattr("kimi_lite.runtime.placement.ANSWER", 1)
    devices = [SimulatedDevice(cap, SLOW_CPU), SimulatedDevice(cap, SLOW_CPU, taken=4 * one)]
    devices += [SimulatedDevice(cap - 4 * one, SLOW_CPU)]
    waiting = iter(devices)
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: next(waiting))
    cpu = Engine(nano_path(), context=context)
    expected = cpu.append(prompt(5, 200))
    for streams in (True, False):  # what is taken is the buffers' place; the second plan then does without
        engine = Engine(nano_path(), context=context, vram=cap)
        assert isinstance(engine.model, HybridModel)
        assert (engine.model.plan.stream_from is not None) == streams
        # Twenty places: three layers hold n and two buffers 8 - n each, 3 n + 2 (8 - n) <= 20.
        assert engine.model.plan.n_resident == 12 if streams else 0 < engine.model.plan.n_resident < 16
        if not streams:
            assert "do not fit" in engine.model.plan.why_not_streamed
        assert np.array_equal(engine.append(prompt(5, 200)), expected)
    assert next(waiting, None) is None


def test_a_card_that_fails_while_pcie_is_measured_is_closed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Failing(SimulatedDevice):
        def speeds(self) -> Speeds:
            raise DeviceLostError("the card failed while it was measured")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: Failing(CARD))
    with pytest.raises(DeviceLostError, match="failed while it was measured"):
        Engine(nano_path(), context=CONTEXT, vram=CARD)
    with pytest.warns(KimiLiteWarning, match="the CPU runs, because the card cannot: the card failed while"):
        assert isinstance(Engine(nano_path(), context=CONTEXT, vram=None).model, CpuModel)
    assert len(closed) == 2


def test_memory_that_runs_out_in_mid_stream_is_a_bad_day_like_others(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SimulatedDevice):
        def bring(self, index: int) -> None:
            if self._start == 40 and index == 3:
                raise DeviceMemoryError("no memory for the copy")
            super().bring(index)

        def close(self) -> None:
            super().close()
            raise DeviceLostError("gone")

    carried_out(monkeypatch, by_hand(weights, NONE, 100), lambda: Failing(CARD))
    engine, cpu = Engine(nano_path(), context=CONTEXT, vram=CARD), cpu_like_a_card(CONTEXT)
    engine.append(prompt(1, 40))
    cpu.append(prompt(1, 40))
    with pytest.warns(KimiLiteWarning, match="no memory for the copy; the CPU goes on and reads 40 tokens"):
        assert np.array_equal(engine.append(prompt(2, LONG)), cpu.append(prompt(2, LONG)))


# ---- the clock and the predictions


def clock(weights: Weights, plan: Plan, speeds: Speeds, T: int, start: int = 0) -> float:
    """Seconds of a step of T tokens on a simulated card."""
    device = SimulatedDevice(CARD, speeds)
    model = HybridModel(weights, device, plan)
    if start:
        model.forward(ids(0, start))
    before = device.clock_s
    model.forward(ids(T, T))
    return device.clock_s - before


def test_copies_run_beside_the_card_and_wait_for_their_buffer(weights: Weights) -> None:
    # Three layers of eight experts; by hand, without launches and hand-offs. Nothing takes time but what is named.
    free = Speeds(1e12, 1e12, 1e12, 1e12, 1e12, launch_us=0, hand_off_us=0, copy_gb_s=1e12)
    plan, T = by_hand(weights, NONE, 2), 100
    one, layer = plan.sizes.layers[-1].expert_bytes, plan.sizes.layers[-1]
    dense = plan.sizes.layers[0]
    copy = 8 * one / 1e9
    # The copies alone: one after the other, whatever is slower, PCIe or the copy in main memory.
    for slow in ("pcie_gb_s", "copy_gb_s"):
        crossing = (
            4 * (T * layer.D + plan.sizes.V) / 1e9 if slow == "pcie_gb_s" else 0
        )  # rows up, logits down
        took = clock(weights, plan, replace(free, **{slow: 1.0}), T)
        assert took == pytest.approx(3 * copy + crossing, rel=1e-6)
    # As much again for the card: it computes a layer while the next layer's experts come.
    macs = T * (layer.attention_macs + layer.shared_macs + 3 * layer.expert_macs)
    macs += sum(range(1, T + 1)) * layer.cache_macs
    first = T * (dense.attention_macs + dense.shared_macs) + sum(range(1, T + 1)) * dense.cache_macs
    ends = plan.sizes.head_macs
    for share in (0.1, 1.0, 10.0):  # of a layer's copies, the card's computing
        rate = macs / (share * copy) / 1e9
        a, b, head = first / rate / 1e9, share * copy, ends / rate / 1e9
        expected = max(a, copy) + max(b, copy) * 2 + b + head
        took = clock(weights, plan, replace(free, copy_gb_s=1.0, card_gmac_s=rate), T)
        assert took == pytest.approx(expected, rel=0.02), share


@pytest.mark.parametrize(
    "speeds",
    [
        Speeds(),
        Speeds(pcie_gb_s=0.05),  # the copies decide
        Speeds(card_gb_s=0.05, card_gmac_s=0.2),  # the card does
        Speeds(copy_gb_s=0.8, launch_us=1),  # both
    ],
)
@pytest.mark.parametrize("resident", [NONE, SOME, UNEVEN])
def test_predictions_agree_with_the_clock(
    weights: Weights, resident: tuple[tuple[int, ...], ...], speeds: Speeds
) -> None:
    plan = by_hand(weights, resident, 2)
    for T, start in ((60, 0), (LONG, 0), (1100, 200)):
        step = predict(plan, speeds, T=T, start=start)
        assert step.cpu_experts == 0
        assert (
            0 <= step.hidden <= min(step.streamed, step.card + step.card_experts) + 1e-9 * step.card
        )  # rounding
        assert step.seconds == pytest.approx(clock(weights, plan, speeds, T, start), rel=0.15), (T, start)
