"""Conversations that take turns in one engine: none is read twice, and each has the bits that it would have alone."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.prompt_cache import WORTH, PromptCache, shared
from kimi_lite.runtime.vision import EncodedImage

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
PLENTY = 1 << 30


def prompt(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 512, n)]


def engine(most_bytes: int | None) -> Engine:
    made = Engine(NANO, context=2048)
    made.prompts = None if most_bytes is None else PromptCache(most_bytes)
    return made


def bytes_of(engine: Engine, n: int) -> int:
    """Of n tokens put aside, by the format: row blocks of 16 positions, C + R int8 and a float16 for each 32."""
    c = engine.config
    width = c.kv_rank + c.rope_dim
    return c.n_layers * -(-n // 16) * 16 * (width + 2 * width // 32)


A, B = prompt(1, 300), prompt(2, 150)
A_MORE = A + prompt(3, 40)


@pytest.fixture(scope="module")
def alone() -> list[NDArray[np.float32]]:
    """What A and its continuation give where nothing else comes between."""
    one = engine(None)
    return [one.prefill(A), one.prefill(A_MORE)]


def test_what_another_prompt_pushed_out_is_not_read_again(alone: list[NDArray[np.float32]]) -> None:
    one = engine(PLENTY)
    assert np.array_equal(one.prefill(A), alone[0])
    one.prefill(B)
    assert one.n_reused == 0
    assert np.array_equal(one.prefill(A_MORE), alone[1])
    assert one.n_reused == len(A)
    assert one.tokens == A_MORE
    one.prefill([*B, 7])
    assert one.n_reused == len(B)


def test_without_it_all_is_read_again() -> None:
    one = engine(None)
    for ids in (A, B, A_MORE):
        one.prefill(ids)
        assert one.n_reused == 0


def test_answers_take_turns_as_if_alone() -> None:
    """Token by token, and with what was decoded kept as well."""
    prompts, answers = (prompt(5, 80), prompt(6, 90)), {}
    for most in (None, PLENTY):
        engines = [engine(None), engine(None)] if most is None else [engine(PLENTY)] * 2
        histories = [list(ids) for ids in prompts]
        for _ in range(3):
            for one, history in zip(engines, histories, strict=True):
                logits = one.prefill(history)
                for _ in range(6):
                    history.append(int(logits.argmax()))
                    logits = one.append(history[-1:])
                history.append(9)
        answers[most] = histories
    assert answers[None] == answers[PLENTY]
    assert engines[0].n_reused == len(histories[1]) - 8  # all but the 9 and what was decoded after it


def test_of_what_was_kept_a_part_may_be_all_that_fits() -> None:
    """A prompt that parts from it in the middle of a row block, and goes on differently."""
    one, other = engine(PLENTY), engine(None)
    for ids in (A, B):
        one.prefill(ids)
    changed = A[:101] + prompt(8, 60)
    other.prefill(A)
    assert np.array_equal(one.prefill(changed), other.prefill(changed))
    assert one.n_reused == other.n_reused == 101
    one.prefill(A_MORE)  # what was kept is whole still
    assert one.n_reused == len(A)


def test_little_is_not_worth_it() -> None:
    one = engine(PLENTY)
    assert one.prompts
    one.prefill(A[: WORTH - 1])
    one.prefill(B)
    assert one.prompts.n_bytes == 0
    one.prefill(B[:-5])
    assert one.prompts.n_bytes == 0
    one.prefill(A)
    assert one.prompts.n_bytes == bytes_of(one, len(B) - 5)


def test_what_goes_on_takes_the_place_of_what_it_goes_on_from() -> None:
    one = engine(PLENTY)
    assert one.prompts
    for ids in (A, B, A_MORE, B):
        one.prefill(ids)
    assert one.prompts.n_bytes == bytes_of(one, len(A_MORE)) + bytes_of(one, len(B))
    for ids in (A_MORE, B, A, B):  # nothing new
        one.prefill(ids)
    assert one.prompts.n_bytes == bytes_of(one, len(A_MORE)) + bytes_of(one, len(B))


def test_memory_is_bounded_and_the_least_recently_used_go() -> None:
    one = engine(0)
    most = 3 * bytes_of(one, 100)
    one.prompts = PromptCache(most)
    prompts = [prompt(20 + i, 100) for i in range(5)]
    for ids in (*prompts[:3], prompts[0] + [1], prompts[3], prompts[4]):
        one.prefill(ids)
        assert one.prompts.n_bytes <= most
    for i, known in ((0, True), (3, True), (1, False)):  # 1 was used first
        one.prefill(prompts[i] + [2])
        assert one.n_reused == (100 if known else 0), i
    one.prefill(prompt(30, 400))
    one.prefill(prompts[3])  # more than the bound is not kept, and pushes nothing out
    assert one.n_reused == 99
    assert 0 < one.prompts.n_bytes <= most


def test_what_came_back_was_used() -> None:
    one = engine(0)
    one.prompts = PromptCache(3 * bytes_of(one, 100))
    prompts = [prompt(50 + i, 100) for i in range(5)]
    for i in (0, 1, 2, 0, 3, 4):  # 1 goes when 3 is kept beside 0 and 2
        one.prefill(prompts[i])
    one.prefill(prompts[0])
    assert one.n_reused == 99
    one.prefill(prompts[1])
    assert one.n_reused == 0


def test_what_comes_back_is_not_what_is_thrown_out_for_it() -> None:
    one = engine(0)
    one.prompts = PromptCache(bytes_of(one, 100) + bytes_of(one, 60))
    first, second = prompt(40, 100), prompt(41, 100)
    for ids in (first, second, first, second):
        one.prefill(ids)
    assert one.n_reused == 99


def test_another_picture_is_not_taken_for_the_one_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")
    one = engine(PLENTY)
    ids = [*A[:10], *[one.pad_id] * 50, *A[60:]]

    def reused(n: int) -> int:
        rows = np.random.default_rng(n).standard_normal((50, one.config.hidden_size)).astype(np.float16)
        one.prefill(B)
        one.prefill(ids, pictures=[EncodedImage(50, rows, f"picture {n}")])
        return one.n_reused

    assert [reused(n) for n in (1, 2, 1, 2)] == [0, 0, len(ids) - 1, len(ids) - 1]


def test_an_interruption_leaves_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch, alone: list[NDArray[np.float32]]
) -> None:
    one = engine(PLENTY)
    for ids in (A, B):
        one.prefill(ids)

    def interrupted(self: LatentCache, first: int, end: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "adopt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.prefill(A_MORE)
    other, changed = engine(None), B[:100] + prompt(9, 20)
    other.prefill(B)
    assert np.array_equal(one.prefill(changed), other.prefill(changed))
    assert np.array_equal(one.prefill(A_MORE), alone[1])


def test_where_there_is_no_memory_it_is_read_again(
    monkeypatch: pytest.MonkeyPatch, alone: list[NDArray[np.float32]]
) -> None:
    one = engine(PLENTY)
    one.prefill(A)

    def full(arrays: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("kimi_lite.runtime.prompt_cache.np.stack", full)
        one.prefill(B)
    assert np.array_equal(one.prefill(A), alone[0])
    assert one.n_reused == 0


def test_over_a_card_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_DEVICE", "simulated:6G")
    one = Engine(NANO, context=2048, vram=None)
    one.prompts = PromptCache(PLENTY)
    for ids in (A, B, A):
        one.prefill(ids)
    assert (one.n_reused, one.prompts.n_bytes) == (0, 0)


@pytest.mark.parametrize(("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 4], [1, 2, 3], 2)])
def test_the_shared_beginning(a: list[int], b: list[int], n: int) -> None:
    assert shared(a, b) == shared(b, a) == n
