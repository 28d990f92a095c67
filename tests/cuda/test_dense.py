"""`--gpu-dense` on the card's own code, over a driver without a card: PyTorch's products between our kernels.

PyTorch works on the CPU, on the memory of the driver without a card; what was queued before it is done first, as on one
stream. The oracle is the simulated card, which knows nothing of buffers and launches: CPU kernels around the same products.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from fake_driver import FakeDriver

from kimi_lite.api import nano_path
from kimi_lite.errors import KimiLiteWarning, UsageError
from kimi_lite.runtime import dense
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import MOST_TOKENS
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.placement import MARGIN, make_plan
from kimi_lite.runtime.speeds import ASSUMED
from kimi_lite.runtime.weights import open_weights

bnb = dense.backend()
CONTEXT = MOST_TOKENS + 34


class TorchOnPaper(bnb.TorchOnCard):  # type: ignore[misc,name-defined]
    """PyTorch on the CPU, on memory of the driver without a card."""

    def __init__(self, fake: FakeDriver, stream: int) -> None:
        self.device, self._fake, self._stream = torch.device("cpu"), fake, stream

    @contextmanager
    def in_order(self) -> Iterator[None]:
        self._fake.run(self._stream)
        yield

    def tensor(self, address: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        n_bytes = prod(shape) * np.dtype(dtype).itemsize
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
        return torch.from_numpy(memory.view(dtype).reshape(shape))


@pytest.fixture
def card(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: CudaDevice(fake.path))
    monkeypatch.setattr(bnb, "TorchOnCard", lambda ordinal, stream: TorchOnPaper(fake, stream))
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")
    return fake


def engine_with(layout: str, n_experts: int) -> tuple[Engine, int]:
    """An engine with so many experts on the card, and the memory that it may take there."""
    sizes = sizes_of(dense.outline(open_weights(nano_path()), layout))
    needed = sizes.fixed_bytes + sizes.cache_bytes(CONTEXT) + sizes.workspace_bytes(CONTEXT)
    cap = round((needed + (n_experts + 0.5) * sizes.layers[-1].expert_bytes) / (1 - MARGIN))
    engine = Engine(nano_path(), context=CONTEXT, vram=cap, gpu_dense=layout)  # which proves itself
    assert isinstance(engine.model, HybridModel)
    assert engine.model.plan.n_resident == n_experts
    return engine, cap - sizes.torch_bytes


@pytest.mark.parametrize(
    ("layout", "n_experts"), [("nf4", 0), ("nf4", 9), ("nf4", 24), ("int8", 9), ("bf16", 24)]
)
def test_every_plan_has_the_bits_of_the_simulated_card_within_its_memory(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch, layout: str, n_experts: int
) -> None:
    engine, cap = engine_with(layout, n_experts)
    assert 0 < card.used() <= cap  # PyTorch's own is beside it
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: SimulatedDevice(1 << 30))
    oracle = Engine(nano_path(), context=CONTEXT, vram=None, gpu_dense=layout)
    rng = np.random.default_rng(n_experts)
    for n in (20, 1, 7, 1, 230, 1):  # below and above what one launch takes for few tokens
        ids = [int(i) for i in rng.integers(0, 800, n)]
        np.testing.assert_array_equal(engine.append(ids), oracle.append(ids))
    for keep in (33, 0):
        engine.rewind(keep)
        oracle.rewind(keep)
        np.testing.assert_array_equal(engine.append([3, 4]), oracle.append([3, 4]))
    assert card.calls("cuGraphLaunch") == 0  # PyTorch's work is in no graph
    assert isinstance(engine.model, HybridModel)
    engine.model.close()
    assert card.used() == 0


def test_streamed_prompts_have_the_bits_of_the_simulated_card(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sizes_of(dense.outline(open_weights(nano_path()), "nf4"))
    plan = make_plan(sizes, device="by hand", free=1 << 30, context=CONTEXT, speeds=ASSUMED)
    some = ((), (0, 1, 2), (), (0, 2, 4, 6))
    streaming = replace(plan, resident=some, hit=(0.0, 3 / 8, 0.0, 1 / 2), stream_from=12)
    monkeypatch.setattr("kimi_lite.runtime.hybrid.make_plan", lambda *_, **__: streaming)
    engine = Engine(nano_path(), context=CONTEXT, vram=None, gpu_dense="nf4")
    # Its proof streamed nine tokens.
    assert card.calls("cuStreamWaitEvent") > 0
    monkeypatch.undo()
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: SimulatedDevice(1 << 30))
    oracle = Engine(nano_path(), context=CONTEXT, vram=None, gpu_dense="nf4")
    rng = np.random.default_rng(3)
    for n in (20, 1, MOST_TOKENS + 2):  # streamed, decoded, streamed in two parts
        ids = [int(i) for i in rng.integers(0, 800, n)]
        np.testing.assert_array_equal(engine.append(ids), oracle.append(ids))
    assert isinstance(engine.model, HybridModel)
    engine.model.close()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
            "no room on the card",
        ),
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with"), "fails on the card"),
    ],
)
def test_pytorch_that_fails_in_mid_answer_is_survived(
    card: FakeDriver, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    engine, _ = engine_with("bf16", 9)
    engine.append([1, 2, 3])

    def failing(self: object, x_TI: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(bnb.Product, "__call__", failing)
    with pytest.warns(KimiLiteWarning, match=rf"{says} \(CUDA .*; the CPU goes on and reads 3 tokens again"):
        logits_V = engine.append([4])
    cpu = Engine(nano_path(), context=CONTEXT)
    np.testing.assert_array_equal(logits_V, cpu.append([1, 2, 3, 4]))


def test_pytorch_that_finds_no_card_is_told_in_a_sentence(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: CudaDevice(fake.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"multiplies by PyTorch .* and finds no card; install one"):
        Engine(nano_path(), context=CONTEXT, vram=1 << 29, gpu_dense="nf4")
    assert fake.used() == 0
