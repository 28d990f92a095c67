"""kimi-vl-nano, whole, on a driver without a card, beside the CPU engine: the same bits, and so the same tokens."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver
from like_a_card import cpu_like_a_card

from kimi_lite.runtime import kernels
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import MOST_TOKENS
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.model import rope_tables

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
CONTEXT = MOST_TOKENS + 34  # a full step, and positions in another chunk than its own


class OnCard:
    """The engine's loop over a device on which all experts lie."""

    def __init__(self, fake: FakeDriver, engine: Engine) -> None:
        self.weights, self.n = engine.weights, 0
        self.device = CudaDevice(fake.path)
        for index, layer in enumerate(self.weights.layers):
            self.device.load_layer(index, layer, None)
        self.device.load_ends(self.weights)
        self.device.reserve_cache(CONTEXT, streams=False)

    def append(self, ids: list[int]) -> Float:
        x_TD = kernels.embed(self.weights.embed, np.asarray(ids, np.int32))
        self.device.begin(x_TD, *rope_tables(self.weights.config, self.n, len(ids)), self.n)
        for index in range(len(self.weights.layers)):
            self.device.attend(index)
            self.device.route(index, wanted=False)
            self.device.run_experts(index)
            self.device.add_experts(index, None)
        self.n += len(ids)
        return self.device.logits()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return cpu_like_a_card(CONTEXT, threads=1)


@pytest.fixture
def on_card(fake: FakeDriver, engine: Engine) -> Iterator[OnCard]:
    engine.rewind(0)
    on_card = OnCard(fake, engine)
    yield on_card
    on_card.device.close()
    assert fake.used() == 0


def same_bits(a: Float, b: Float) -> bool:
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("cuts", [(40,), (1, 39), (3, 8, 29), (33, 7)])
def test_a_prompt_in_any_cut_then_greedy_decoding(
    fake: FakeDriver, engine: Engine, on_card: OnCard, cuts: tuple[int, ...]
) -> None:
    prompt = engine.tokenizer.encode(
        "How many letters has the word kilometre, and which of them come twice? "
    )
    prompt = (prompt * 4)[:40]
    at = 0
    for n in cuts:
        ours = on_card.append(prompt[at : at + n])
        at += n
    theirs = engine.append(prompt)
    assert same_bits(ours, theirs)
    captured = fake.calls("cuStreamEndCapture")
    for _ in range(6):
        token = int(ours.argmax())
        assert token == int(theirs.argmax())
        ours, theirs = on_card.append([token]), engine.append([token])
        assert same_bits(ours, theirs)
    # All decoded tokens share one graph, which a prompt's first token may have captured already.
    assert fake.calls("cuStreamEndCapture") == max(captured, 1)
    assert fake.calls("cuGraphLaunch") == 6 + (1 in cuts)


def test_a_full_step_and_the_end_of_the_context(engine: Engine, on_card: OnCard) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 800, CONTEXT)]
    on_card.append(ids[:MOST_TOKENS])
    assert same_bits(on_card.append(ids[MOST_TOKENS:-1]), engine.append(ids[:-1]))
    assert same_bits(on_card.append(ids[-1:]), engine.append(ids[-1:]))
