"""The model over a simulated card: the bits of the CPU engine wherever experts lie, and what happens on bad days.

The oracle is the CPU engine, which has oracles of its own. Caps are chosen by what nano takes: 1.9 MB for what every token
reads, 45,056 bytes for each of 24 experts.
"""

import gc
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from like_a_card import cpu_like_a_card
from PIL import Image

import kimi_lite
from kimi_lite.api import nano_path
from kimi_lite.errors import DoesNotFitError, KimiLiteError, KimiLiteWarning, UsageError
from kimi_lite.runtime.cost import encode_s, sizes_of
from kimi_lite.runtime.cuda import find
from kimi_lite.runtime.cuda.device import (
    MOST_TOKENS,
    Device,
    DeviceLostError,
    DeviceMemoryError,
    DeviceWrongError,
    NoDeviceError,
)
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.cuda.tower import TowerShape, room_for
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import PROOF, PROOF_GRID, HybridModel, longest
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import MARGIN, plan_tower
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.vision import ImageEncoder, Progress, VisionWeights, open_vision, tower_facts
from kimi_lite.runtime.weights import Weights, open_weights

GREEDY = SamplingOptions()
CONTEXT = 700
CARD = 64_000_000
QUESTIONS = ("What is 38 + 47?", 'Reverse "planet".')


# Pieces of work of the two steps by which a card proves itself: 4 layers of 4, and the head.
PROVEN = len(PROOF) * (4 * 4 + 1)
# And of a tower that is uploaded, proves itself and encodes: 5 blocks between the patch projection and the projector.
ENCODED = 1 + 2 * (5 + 2)


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(nano_path())


def cap_for(weights: Weights, n_experts: float, context: int = CONTEXT) -> int:
    """The memory that holds n experts beside all else, and half an expert more."""
    sizes = sizes_of(weights)
    fixed = sizes.fixed_bytes + sizes.cache_bytes(context) + sizes.workspace_bytes(context)
    return round((fixed + (n_experts + 0.5) * sizes.layers[-1].expert_bytes) / (1 - MARGIN))


def simulated(monkeypatch: pytest.MonkeyPatch, *devices: Callable[[], Device]) -> None:
    """Cards that are found, one after the other; the last for ever."""
    made = itertools.chain(devices, itertools.repeat(devices[-1]))
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: next(made)())


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch, lambda: SimulatedDevice(CARD))


def on_card(weights: Weights, n_experts: int) -> Engine:
    engine = Engine(nano_path(), context=CONTEXT, vram=cap_for(weights, n_experts))
    assert isinstance(engine.model, HybridModel)
    assert engine.model.plan.n_resident == n_experts
    return engine


def model_of(model: kimi_lite.Model) -> CpuModel | HybridModel:
    """What runs the text model."""
    assert isinstance(model.engine, Engine)
    return model.engine.model


def prompt(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 800, n)]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("n_experts", [0, 1, 9, 23, 24])
def test_logits_have_the_same_bits_wherever_experts_lie(weights: Weights, n_experts: int) -> None:
    cpu, hybrid = cpu_like_a_card(CONTEXT), on_card(weights, n_experts)
    # Steps that end inside, at and beyond groups of 32 positions and steps of MOST_TOKENS; then one by one.
    for step, n in enumerate([1, 30, 2, MOST_TOKENS + 44, 31, *[1] * 6]):
        ids = prompt(step, n)
        assert np.array_equal(hybrid.append(ids), cpu.append(ids)), (step, n)
    for keep in (350, 17, 0):
        hybrid.rewind(keep)
        cpu.rewind(keep)
        ids = prompt(keep, 40)
        assert np.array_equal(hybrid.append(ids), cpu.append(ids)), keep


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("n_experts", [0, 10, 24])
def test_a_conversation_with_a_picture_says_the_same(
    weights: Weights, n_experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disc = tmp_path / "disc.png"
    scene("red", "circle", 1, (3, 3), np.random.default_rng(0))[0].save(disc)

    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")  # each encodes for itself

    def talk(vram: int) -> list[Any]:
        model = kimi_lite.load(context=CONTEXT, vram=vram)
        assert isinstance(model_of(model), HybridModel if vram else CpuModel)
        said = []
        for question, images in (("What colour is it?", [disc]), (QUESTIONS[0], []), (QUESTIONS[1], [])):
            events = list(model.chat(question, images=images))
            said += [(e.kind, e.text, e.reason, e.stats and e.stats.reused) for e in events]
        return said

    with pytest.warns(KimiLiteWarning, match="but .* are left; the CPU encodes what does not fit"):
        ours = talk(cap_for(weights, n_experts))
    theirs = talk(0)
    assert ours == theirs
    assert theirs[-1][3] > 50  # the turns before were not computed again


@pytest.mark.usefixtures("card")
def test_a_standard_gguf_runs_over_a_card_with_the_same_bits(tmp_path: Path) -> None:
    from kimi_lite.quantize.convert import quantize

    for to in ("q8_0", "bf16"):  # packed at load; and products of floats
        path = tmp_path / f"{to}.gguf"
        quantize(nano_path().parent, path, to=to)
        cap = cap_for(open_weights(path), 7)
        hybrid = Engine(path, context=CONTEXT, vram=cap)
        assert isinstance(hybrid.model, HybridModel)
        assert hybrid.model.plan.n_resident == 7
        ids = prompt(3, 40)
        assert np.array_equal(hybrid.append(ids), Engine(path, context=CONTEXT).append(ids))


# Bad days


@pytest.mark.parametrize("lost_after", [0, 1, 16, 17, 19, 60, 500])
def test_a_card_that_fails_costs_a_warning_and_no_token(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, lost_after: int
) -> None:
    expected = kimi_lite.load(context=CONTEXT, vram=0).ask(QUESTIONS[1])
    simulated(monkeypatch, lambda: SimulatedDevice(CARD, lost_after=PROVEN + lost_after))
    model = kimi_lite.load(context=CONTEXT, vram=cap_for(weights, 9))
    with pytest.warns(
        KimiLiteWarning, match=r"does not answer any more; the CPU goes on( and reads \d+ tok|$)"
    ):
        answer = model.ask(QUESTIONS[1])
    assert (answer.text, answer.thinking, answer.reason) == (
        expected.text,
        expected.thinking,
        expected.reason,
    )
    assert isinstance(model_of(model), CpuModel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.ask(QUESTIONS[0]).text == kimi_lite.load(context=CONTEXT, vram=0).ask(QUESTIONS[0]).text


def test_a_card_that_cannot_even_be_closed_or_runs_out_of_memory_is_left_alike(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SimulatedDevice):
        def attend(self, index: int) -> None:
            if index == 2 and self._start == 240:
                raise DeviceMemoryError("no memory for the scores")
            super().attend(index)

        def close(self) -> None:
            super().close()
            raise DeviceLostError("gone")

    simulated(monkeypatch, lambda: Failing(CARD))
    hybrid, cpu = Engine(nano_path(), context=CONTEXT, vram=CARD), cpu_like_a_card(CONTEXT)
    hybrid.append(prompt(1, 240))  # long enough to be expanded on a CPU that was alone from the start
    cpu.append(prompt(1, 240))
    with pytest.warns(
        KimiLiteWarning, match="no memory for the scores; the CPU goes on and reads 240 tokens"
    ):
        logits_V = hybrid.append([5])
    assert np.array_equal(logits_V, cpu.append([5]))
    assert hybrid.tokens == cpu.tokens


def test_a_card_that_computes_other_values_is_not_used(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(SimulatedDevice):
        def add_experts(self, index: int, outputs_MD: Float | None) -> None:
            super().add_experts(index, outputs_MD)
            if len(self._x_TD) == 1:  # the kernels for one token only
                self._x_TD[0, 7] += 0.1

    simulated(monkeypatch, lambda: Wrong(CARD))
    with pytest.raises(DeviceWrongError, match="computes other values than the CPU"):
        Engine(nano_path(), context=CONTEXT, vram=CARD)
    with pytest.warns(KimiLiteWarning, match="the CPU runs, because the card cannot: .*other values"):
        assert isinstance(Engine(nano_path(), context=CONTEXT, vram=None).model, CpuModel)
    for context in (1, 2, 10):  # a proof is as long as there is room
        simulated(monkeypatch, lambda: SimulatedDevice(CARD))
        engine = Engine(nano_path(), context=context, vram=CARD)
        assert isinstance(engine.model, HybridModel)
        assert engine.model.n == 0


def test_memory_comes_back_when_the_model_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimulatedDevice(CARD)
    simulated(monkeypatch, lambda: card)
    engine = Engine(nano_path(), context=CONTEXT, vram=CARD)
    assert card.free_bytes() < CARD
    del engine
    gc.collect()
    assert card.free_bytes() == CARD


def test_a_card_that_fails_after_a_picture_reads_the_picture_again(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disc = tmp_path / "disc.png"
    scene("blue", "circle", 1, (3, 3), np.random.default_rng(1))[0].save(disc)
    expected = kimi_lite.load(context=CONTEXT, vram=0).ask("What colour is it?", images=[disc])
    # A step is 4 layers of 4 pieces and the head; the picture and the question are one step, so this is in the second.
    simulated(monkeypatch, lambda: SimulatedDevice(CARD, lost_after=PROVEN + ENCODED + 25))
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")
    model = kimi_lite.load(context=CONTEXT, vram=CARD)
    with pytest.warns(KimiLiteWarning, match="the CPU goes on"):
        assert model.ask("What colour is it?", images=[disc]).text == expected.text


# Pictures


def disc(seed: int = 0) -> Image.Image:
    return scene("red", "circle", 1, (3, 3), np.random.default_rng(seed))[0]


def encoder(engine: Engine) -> ImageEncoder:
    """What loading a model makes of its file's image side, without a cache on disk."""
    assert engine.image_side is not None
    return ImageEncoder(engine.image_side, engine.config.hidden_size, ImageCache(None), run=engine.encode)


def rows_of(vram: int, pictures: list[Image.Image]) -> tuple[Engine, list[bytes]]:
    engine = Engine(nano_path(), context=CONTEXT, vram=vram)
    return engine, [seen.rows_MD.tobytes() for seen in encoder(engine).encode(pictures)]


class Watched(SimulatedDevice):
    """A card that keeps how many patches it was asked to encode, call by call."""

    def __init__(self, lost_after: int | None = None) -> None:
        super().__init__(CARD, lost_after=lost_after)
        self.sizes = list[list[int]]()

    def encode(
        self, weights: VisionWeights, canvases: Any, on_progress: Progress | None = None
    ) -> list[Float]:
        self.sizes.append([pixels.size // (3 * 14**2) for pixels in canvases])
        return super().encode(weights, canvases, on_progress)


def watched(monkeypatch: pytest.MonkeyPatch, lost_after: int | None = None) -> Watched:
    """The card that is found."""
    card = Watched(lost_after)
    simulated(monkeypatch, lambda: card)
    return card


PROOF_PATCHES = PROOF_GRID[0] * PROOF_GRID[1]


def test_a_tower_with_room_stays_on_the_card_and_proves_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = watched(monkeypatch)
    engine = Engine(nano_path(), context=CONTEXT, vram=CARD)
    assert isinstance(engine.model, HybridModel)
    see, before = encoder(engine), card.free_bytes()
    cpu = rows_of(0, [disc(), disc(1)])[1]
    for seed in (0, 1):
        (seen,) = see.encode([disc(seed)])
        assert seen.rows_MD.tobytes() == cpu[seed]
    assert card.sizes[0] == [PROOF_PATCHES]
    assert len(card.sizes) == 3
    config, _, D = tower_facts(nano_path())
    assert before - card.free_bytes() == TowerShape.of(config, D).bytes  # and nothing beside it
    engine.model.close()
    assert card.free_bytes() == CARD


def test_a_tower_without_room_passes_through_what_is_left(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, image, D = tower_facts(nano_path())
    shape = TowerShape.of(config, D)
    # As if the margin were so large that a picture fits into it, but neither a tower nor the longest picture.
    monkeypatch.setattr("kimi_lite.runtime.placement.MARGIN", 0.4)
    sizes = sizes_of(weights)
    least = sizes.fixed_bytes + sizes.cache_bytes(CONTEXT) + sizes.workspace_bytes(CONTEXT)
    cap = round(least / 0.6) + 10
    card = watched(monkeypatch)
    engine = Engine(nano_path(), context=CONTEXT, vram=cap)
    assert isinstance(engine.model, HybridModel)
    plan = plan_tower(shape, engine.model.plan.left_bytes, longest(image.token_limit))
    assert not plan.resident
    assert PROOF_PATCHES < plan.most_patches < 3000
    before = card.free_bytes()
    found = [seen.rows_MD.tobytes() for seen in encoder(engine).encode([disc()])]
    assert found == rows_of(0, [disc()])[1]
    assert card.sizes
    assert card.free_bytes() == before  # all that it took came back
    with pytest.raises(DeviceMemoryError, match=r"patches takes .* are left"):
        engine.model._check_room(open_vision(nano_path()), shape, [plan.most_patches + 1])


@pytest.mark.parametrize("kept", [False, True])
def test_room_is_looked_for_before_the_proof_and_again_beside_a_kept_tower(
    monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    card = watched(monkeypatch)
    engine = Engine(nano_path(), context=CONTEXT, vram=CARD)
    model = engine.model
    assert isinstance(model, HybridModel)
    tower = open_vision(nano_path())
    shape, most = TowerShape.of(tower.config, tower.text_width), longest(tower.image.token_limit)
    squares = 1
    room = room_for(shape, [4], resident=False)  # for the picture, but not for the one of the proof
    if kept:  # for a tower and its longest picture, but not for many small ones, whose rows round up to more
        room = shape.bytes + room_for(shape, [most], resident=True)
        squares = next(
            n for n in range(1, most) if shape.bytes + room_for(shape, [4] * n, resident=True) > room
        )
        assert room_for(shape, [4] * squares, resident=False) <= room
    monkeypatch.setattr(model, "left", lambda: room - (shape.bytes if model._kept else 0))
    canvas = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(DeviceMemoryError, match=r"patches takes .* are left"):
        model.encode(tower, [canvas] * squares)
    assert card.sizes == ([[PROOF_PATCHES]] if kept else [])


def test_a_picture_without_room_is_the_cpus_and_that_is_said_once(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = watched(monkeypatch)
    engine = Engine(nano_path(), context=CONTEXT, vram=cap_for(weights, 3))
    see = encoder(engine)
    with pytest.warns(
        KimiLiteWarning, match=r"patches takes \d.* MB, but \d.* left; the CPU encodes what does"
    ) as said:
        found = [see.encode([disc(seed)])[0].rows_MD.tobytes() for seed in (0, 1)]
    assert len(said) == 1
    assert found == rows_of(0, [disc(), disc(1)])[1]
    assert card.sizes == []
    assert isinstance(engine.model, HybridModel)  # the text stays where it was


@pytest.mark.parametrize("after", [1, 4, 8, 12])
def test_a_card_that_fails_while_it_encodes_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    watched(monkeypatch, PROVEN + after)
    with pytest.warns(KimiLiteWarning, match="does not answer any more; the CPU goes on$"):
        engine, found = rows_of(CARD, [disc()])
    assert found == rows_of(0, [disc()])[1]
    assert isinstance(engine.model, CpuModel)
    ids = prompt(1, 20)
    assert np.array_equal(engine.append(ids), Engine(nano_path(), context=CONTEXT).append(ids))


def test_a_tower_that_gives_other_rows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SimulatedDevice):
        def encode(
            self, weights: VisionWeights, canvases: Any, on_progress: Progress | None = None
        ) -> list[Float]:
            out = super().encode(weights, canvases, on_progress)
            out[0][-1, 3] = np.nextafter(out[0][-1, 3], np.inf)
            return out

    simulated(monkeypatch, lambda: Wrong(CARD))
    with pytest.warns(KimiLiteWarning, match=r"other values than the CPU.*; the CPU encodes pictures"):
        engine, found = rows_of(CARD, [disc()])
    found += [encoder(engine).encode([disc(1)])[0].rows_MD.tobytes()]  # a second warning would be an error
    assert found == rows_of(0, [disc(), disc(1)])[1]
    assert isinstance(engine.model, HybridModel)


def test_encoding_moves_the_clock_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimulatedDevice(CARD)
    weights = open_vision(nano_path())
    config, _, D = tower_facts(nano_path())
    pixels = [np.zeros((14 * 10, 14 * 12, 3), np.uint8)]
    predicted = sum(encode_s(TowerShape.of(config, D), card.speeds(), [120], resident=False))
    card.encode(weights, pixels)
    assert card.clock_s == pytest.approx(predicted)
    card.keep_tower(weights)
    before = card.clock_s
    card.encode(weights, pixels)
    assert (
        0
        < card.clock_s - before
        < predicted + sum(map(card.speeds().crossing_s, TowerShape.of(config, D).part_bytes))
    )


def test_memory_taken_between_plan_and_load_is_planned_around_once(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = 256  # so short that a margin holds less than what is taken
    cap = cap_for(weights, 20, context)
    taken = 5 * sizes_of(weights).layers[-1].expert_bytes
    simulated(monkeypatch, lambda: SimulatedDevice(cap, taken=taken), lambda: SimulatedDevice(cap - taken))
    engine = Engine(nano_path(), context=context, vram=cap)
    assert isinstance(engine.model, HybridModel)
    assert 0 < engine.model.plan.n_resident < 15
    ids = prompt(1, 20)
    assert np.array_equal(engine.append(ids), Engine(nano_path(), context=context).append(ids))


def test_memory_that_is_taken_again_is_said_with_numbers(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap, closed = cap_for(weights, 20), []

    class Watched(SimulatedDevice):
        def close(self) -> None:
            super().close()
            closed.append(self)

    simulated(monkeypatch, lambda: Watched(cap, taken=cap // 2))
    with pytest.raises(DoesNotFitError, match=r"taken by another program.*takes \d.*MB, but \d.*--vram 0"):
        Engine(nano_path(), context=CONTEXT, vram=cap)
    assert len(closed) == 2  # nothing stays on the card
    with pytest.warns(KimiLiteWarning, match="the CPU runs, because the card cannot"):
        assert isinstance(Engine(nano_path(), context=CONTEXT, vram=None).model, CpuModel)


@pytest.mark.usefixtures("card")
def test_a_cap_that_is_too_small_is_refused_with_what_would_fit(weights: Weights) -> None:
    cap = cap_for(weights, 0, context=300)
    with pytest.raises(DoesNotFitError) as caught:
        Engine(nano_path(), context=CONTEXT, vram=cap)
    fits = int(str(caught.value).partition("--context ")[2].partition(")")[0])
    assert 290 < fits < CONTEXT
    assert isinstance(Engine(nano_path(), context=fits, vram=cap).model, HybridModel)
    with pytest.raises(DoesNotFitError):
        Engine(nano_path(), context=fits + 8, vram=cap)
    with pytest.raises(DoesNotFitError, match=r"--vram allows 0\.05 MB; --vram 0 runs"):
        Engine(nano_path(), context=CONTEXT, vram=50_000)


def test_a_card_without_room_is_said_and_the_cpu_runs_unless_the_card_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulated(monkeypatch, lambda: SimulatedDevice(100_000))
    with pytest.warns(KimiLiteWarning, match=r"the CPU runs.*are needed at least.*0\.10 MB are free"):
        assert isinstance(Engine(nano_path(), vram=None).model, CpuModel)
    with pytest.raises(DoesNotFitError, match="are free"):
        Engine(nano_path(), vram=8_000_000_000)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a driver, and the folder where its cards are listed."""
    monkeypatch.delenv("KIMI_LITE_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(find, "DRIVERS", ("libnothing.so.1",))
    monkeypatch.setattr(find, "PCI", tmp_path)
    return tmp_path


def plug_in(machine: Path, slot: str, vendor: str, kind: str = "0x030000") -> None:
    (machine / slot).mkdir()
    (machine / slot / "vendor").write_text(f"{vendor}\n")
    (machine / slot / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize(
    ("vendors", "says"),
    [
        ([], "no graphics card with an NVIDIA driver is here"),
        (["0x1002"], "by AMD; kimi-lite's kernels are for NVIDIA cards"),
        (["0x8086", "0x1002"], "by AMD and Intel"),
        (["0x8086", "0x10de"], "an NVIDIA card is there, but not its driver"),
    ],
)
def test_no_driver_is_said_if_a_card_was_asked_for(machine: Path, vendors: list[str], says: str) -> None:
    plug_in(machine, "net", "0x8086", "0x020000")
    for i, vendor in enumerate(vendors):
        plug_in(machine, f"{i}", vendor)
    with pytest.raises(NoDeviceError, match=f"a card was asked for, but.*{says}.*--vram 0"):
        Engine(nano_path(), vram=8_000_000_000)
    assert isinstance(Engine(nano_path(), vram=None).model, CpuModel)


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_cards_are_said(machine: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(NoDeviceError, match=f"CUDA_VISIBLE_DEVICES is '{value}', which hides"):
        Engine(nano_path(), vram=8_000_000_000)


@pytest.mark.parametrize(
    "error",
    [NoDeviceError("the driver is too old"), KimiLiteError("no compiler"), DeviceMemoryError("all taken")],
)
def test_a_card_that_cannot_be_opened_is_said_and_the_cpu_runs(
    machine: Path, monkeypatch: pytest.MonkeyPatch, error: KimiLiteError
) -> None:
    kernels: Any = ModuleType(find.KERNELS)

    def open_device() -> Device:
        raise error

    kernels.open_device = open_device
    monkeypatch.setattr(find, "has_driver", lambda: True)
    monkeypatch.setattr(find, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, find.KERNELS, kernels)
    with pytest.raises(type(error), match=str(error)):
        Engine(nano_path(), vram=8_000_000_000)
    with pytest.warns(KimiLiteWarning, match=f"the CPU runs, because the card cannot: {error}"):
        assert isinstance(Engine(nano_path(), vram=None).model, CpuModel)


def test_of_two_cards_the_roomier_is_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_DEVICE", "simulated:6G,8G")
    engine = Engine(nano_path(), vram=None)
    assert isinstance(engine.model, HybridModel)
    assert engine.model.plan.device == "a simulated card of 8.00 GB, the roomiest of 2"
    assert engine.model.plan.budget == 8_000_000_000
    monkeypatch.setenv("KIMI_LITE_DEVICE", "imaginary")
    with pytest.raises(UsageError, match="KIMI_LITE_DEVICE is 'imaginary'"):
        find.find_device()
