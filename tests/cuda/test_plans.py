"""Plans carried out on the card's own code, over a driver without a card: the CPU engine's bits, in the memory that was planned."""

import gc
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from fake_driver import FakeDriver

from kimi_lite.api import nano_path
from kimi_lite.errors import KimiLiteWarning, UsageError
from kimi_lite.quantize.calibrate import Passage
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.tower import TowerShape
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import MARGIN
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.vision import EncodedImage, ImageEncoder, tower_facts
from kimi_lite.runtime.weights import open_weights

CONTEXT = 100


@pytest.fixture
def card(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: CudaDevice(fake.path))
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")
    return fake


def engine_with(n_experts: int) -> tuple[Engine, int]:
    """An engine with so many experts on the card, and the memory that it may take there."""
    sizes = sizes_of(open_weights(nano_path()))
    needed = sizes.fixed_bytes + sizes.cache_bytes(CONTEXT) + sizes.workspace_bytes(CONTEXT)
    cap = round((needed + (n_experts + 0.5) * sizes.layers[-1].expert_bytes) / (1 - MARGIN))
    engine = Engine(nano_path(), context=CONTEXT, vram=cap)
    assert isinstance(engine.model, HybridModel)
    assert engine.model.plan.n_resident == n_experts
    return engine, cap


@pytest.mark.parametrize("n_experts", [0, 9, 24])
def test_every_plan_has_the_bits_of_the_cpu_and_stays_within_its_memory(
    card: FakeDriver, n_experts: int
) -> None:
    (engine, cap), cpu = engine_with(n_experts), Engine(nano_path(), context=CONTEXT)
    assert 0 < card.used() <= cap
    rng = np.random.default_rng(n_experts)
    for n in (20, 1, 13, 1, 1):
        ids = [int(i) for i in rng.integers(0, 800, n)]
        assert np.array_equal(engine.append(ids), cpu.append(ids))
    del engine
    gc.collect()
    assert card.used() == 0  # with the engine, its memory went


def test_waiting_for_the_card_in_mid_step_changes_no_bit(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine, _), cpu = engine_with(9), Engine(nano_path(), context=CONTEXT)
    run_experts = CudaDevice.run_experts

    def and_wait(self: CudaDevice, index: int) -> None:
        run_experts(self, index)
        waits = card.calls("cuStreamSynchronize")
        self.wait()
        assert card.calls("cuStreamSynchronize") == waits + 1

    monkeypatch.setattr(CudaDevice, "run_experts", and_wait)
    for ids in ([1, 2, 3], [4], [5]):
        assert np.array_equal(engine.append(ids), cpu.append(ids))


@pytest.mark.parametrize("to", ["q4_0", "q8_0", "int3"])
def test_a_standard_gguf_that_is_packed_at_load_and_a_file_of_three_bits_run_with_the_bits_of_the_cpu(
    card: FakeDriver, tmp_path: Path, to: Literal["q4_0", "q8_0", "int3"]
) -> None:
    path = tmp_path / f"{to}.gguf"
    sample = (lambda: [Passage(range(200))]) if to == "int3" else None
    quantize(nano_path().parent, path, to=to, sample=sample)
    engine, cpu = Engine(path, context=CONTEXT, vram=1 << 26), Engine(path, context=CONTEXT)
    assert isinstance(engine.model, HybridModel)
    assert engine.model.plan.whole
    for ids in ([5, 6, 7, 8, 9, 10, 11, 12, 13], [14], list(range(15, 75))):
        assert np.array_equal(engine.append(ids), cpu.append(ids))


def test_a_file_that_no_gpu_kernel_reads_runs_on_the_cpu_or_says_what_to_do(
    card: FakeDriver, tmp_path: Path
) -> None:
    path = tmp_path / "bf16.gguf"
    quantize(nano_path().parent, path, to="bf16")
    says = r"the layout BF16 has no GPU kernel, only q4g32, q8g32, q4b32, q3b32 have .*--vram 0, or .*kimi-lite quantize CHECK"
    with pytest.raises(UsageError, match=rf"^layer 0, q: {says}"):
        Engine(path, context=CONTEXT, vram=1 << 26)
    with pytest.warns(KimiLiteWarning, match=rf"the CPU runs, because the card cannot: .*{says}"):
        assert isinstance(Engine(path, context=CONTEXT, vram=None).model, CpuModel)


def seen_by(engine: Engine) -> EncodedImage:
    """A picture, encoded where the engine encodes."""
    assert engine.image_side is not None
    see = ImageEncoder(engine.image_side, engine.config.hidden_size, ImageCache(None), run=engine.encode)
    return see.encode([scene("red", "circle", 1, (3, 3), np.random.default_rng(0))[0]])[0]


def test_a_picture_is_encoded_on_the_card_and_answered_about_with_the_bits_of_the_cpu(
    card: FakeDriver,
) -> None:
    engine, cpu = Engine(nano_path(), context=CONTEXT, vram=1 << 29), Engine(nano_path(), context=CONTEXT)
    before, launched = card.used(), card.calls("cuLaunchKernel")
    ours, theirs = seen_by(engine), seen_by(cpu)
    assert card.calls("cuLaunchKernel") > launched
    assert ours.rows_MD.tobytes() == theirs.rows_MD.tobytes()
    config, _, D = tower_facts(nano_path())
    assert card.used() == before + TowerShape.of(config, D).bytes  # there was room for it to stay
    prompt = [1, *[engine.pad_id] * ours.n_tokens, 2, 3]
    assert np.array_equal(engine.prefill(prompt, pictures=[ours]), cpu.prefill(prompt, pictures=[theirs]))
    del engine
    gc.collect()
    assert card.used() == 0


def test_a_launch_that_fails_in_mid_answer_is_survived(card: FakeDriver) -> None:
    (engine, _), cpu = engine_with(9), Engine(nano_path(), context=CONTEXT)
    engine.append([1, 2, 3])
    cpu.append([1, 2, 3])
    card.fail("cuGraphLaunch", 719, after=2)
    with pytest.warns(KimiLiteWarning, match="the CPU goes on and reads 3 tokens again"):
        logits_V = engine.append([4])
    assert np.array_equal(logits_V, cpu.append([4]))
