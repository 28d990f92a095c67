"""Guesses by prompt lookup: what is guessed, when it pays, and that no answer changes."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import kimi_lite
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.constraint import Constraint
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.lookup import LEAST, MOST_GUESSES, STEPS, PromptLookup
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.weights import open_weights

GREEDY = SamplingOptions()
QUESTION = 'Reverse "planet".'
CHEAP = dict.fromkeys(STEPS, 1.0)  # a step of any length takes as long as one token's: guess all that can be
BYTES = {2: 1.48, 4: 2.30, 8: 3.52}  # of the published model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write_checkpoint(folder / "checkpoint", vision=None)
    made = {to: folder / f"{to}.gguf" for to in ("int4", "q4_0", "bf16")}
    for to, path in made.items():
        quantize(checkpoint, path, to=to)  # type: ignore[arg-type]
    return made


def prompt(seed: int, n: int, below: int = 512) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, below, n)]


class Always(PromptLookup):
    """Guesses whenever it can, so that right and wrong ones are met often."""

    def _cost(self, n: int) -> float:
        return 1.0


class Told(PromptLookup):
    """Knows the answer, and tells it with a mistake now and then."""

    def __init__(self, tokens: Sequence[int], room: int, answer: Sequence[int]) -> None:
        super().__init__(tokens, room, 600, CHEAP)
        self._room, self._answer = room, answer
        self._start, self._draw = len(tokens), random.Random(1)

    def guess(self, most: int) -> list[int]:
        at = self._n - self._start
        assert most == self._room - at - 1  # behind the newest token, which is drawn but not run
        ahead = list(self._answer[at : at + min(most, self._draw.choice((0, 1, 3, 7)))])
        if ahead and self._draw.random() < 0.6:
            wrong = self._draw.randrange(len(ahead))
            ahead[wrong] = (ahead[wrong] + 1) % 512
        return ahead


def guessing(
    path: Path, kind: Callable[[Sequence[int], int], PromptLookup] | None, context: int | None = None
) -> Engine:
    engine = Engine(path, context=context)
    engine.guessing = kind is not None
    if kind:
        engine.look_up = lambda room: kind(engine.tokens, room)  # type: ignore[method-assign]
    return engine


def told(answer: Sequence[int]) -> Callable[[Sequence[int], int], PromptLookup]:
    return lambda tokens, room: Told(tokens, room, answer)


def always(tokens: Sequence[int], room: int) -> PromptLookup:
    return Always(tokens, room, 600, CHEAP)


@pytest.mark.parametrize("to", ["int4", "q4_0", "bf16"])
@pytest.mark.parametrize("T", [1, *STEPS])
def test_a_step_that_checks_gives_each_tokens_own_logits(files: dict[str, Path], to: str, T: int) -> None:
    weights, ids = open_weights(files[to]), np.array(prompt(1, 45), np.int32)
    one, several = CpuModel(weights, 64), CpuModel(weights, 64)
    one.forward(ids[:37])
    several.forward(ids[:37])
    singly = [one.forward(ids[i : i + 1]) for i in range(37, 37 + T)]
    assert np.array_equal(several.check(ids[37 : 37 + T]), singly)
    # and the cache goes on from any of them
    several.rewind(37 + T // 2)
    rest = ids[37 + T // 2 : 45]
    assert np.array_equal(several.forward(rest), CpuModel(weights, 64).forward(ids))


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        SamplingOptions(temperature=0.7, top_p=0.9, seed=5),
        SamplingOptions(temperature=0.2, repetition_penalty=1.02, presence_penalty=0.1, seed=6),
    ],
)
def test_an_answer_is_the_same_with_guesses_and_without(
    files: dict[str, Path], options: SamplingOptions
) -> None:
    right = wrong = 0
    for seed in range(6):
        ids, plain = prompt(seed, 60), guessing(files["int4"], None)
        expected = list(plain.generate(ids, options, max_tokens=60))
        guessed = guessing(files["int4"], told(expected))
        assert list(guessed.generate(ids, options, max_tokens=60)) == expected
        assert (guessed.finish_reason, plain.n_guessed) == (plain.finish_reason, 0)
        assert guessed.tokens[:60] == ids
        assert guessed.tokens[60:] == expected[: len(guessed.tokens) - 60]
        # What the cache holds is what those tokens give: nothing of a wrong guess stays.
        n = len(guessed.tokens)
        again = Engine(files["int4"])
        again.append(guessed.tokens)
        assert np.array_equal(guessed.append([7]), again.append([7]))
        assert len(guessed.tokens) == n + 1
        right, wrong = right + guessed.n_right, wrong + guessed.n_guessed - guessed.n_right
    assert min(right, wrong) > 50


def test_an_answer_in_a_grammar_is_the_same_too(files: dict[str, Path]) -> None:
    ids, right = prompt(3, 40), 0
    for options in (GREEDY, SamplingOptions(temperature=1.0, seed=2)):
        answers = []
        for kind in (None, always):
            engine = guessing(files["int4"], kind)
            rule = Constraint(engine.tokenizer, regex="(ab|cd){20,30}")
            answers.append(list(engine.generate(ids, options, max_tokens=90, constraint=rule)))
        right += engine.n_right
        assert answers[0] == answers[1]
        assert len(answers[0]) > 15
    assert right > 0


def test_limits_hold_to_the_token_amid_guesses(files: dict[str, Path]) -> None:
    ids, guessed = prompt(2, 30), 0
    whole = list(guessing(files["int4"], None).generate(ids, GREEDY, max_tokens=40))
    assert len(whole) == 40  # it does not end by itself
    for n in range(1, 25):
        limited = guessing(files["int4"], told(whole))
        assert list(limited.generate(ids, GREEDY, max_tokens=n)) == whole[:n]
        assert limited.finish_reason == "length"
        small = guessing(files["int4"], told(whole), context=30 + n)
        assert list(small.generate(ids, GREEDY)) == whole[:n]
        assert small.finish_reason == "context"
        assert len(small.tokens) < small.context
        guessed += small.n_guessed
    assert guessed > 50


def test_an_answer_that_is_closed_amid_guesses_leaves_only_what_was_said(files: dict[str, Path]) -> None:
    ids, guessed = prompt(2, 30), 0
    whole = list(guessing(files["int4"], None).generate(ids, GREEDY, max_tokens=40))
    for n in range(1, 20):
        engine = guessing(files["int4"], told(whole))
        stream = engine.generate(ids, GREEDY, max_tokens=40)
        assert list(itertools.islice(stream, n)) == whole[:n]
        stream.close()  # type: ignore[attr-defined]
        assert engine.finish_reason == "cancelled"
        assert len(engine.tokens) <= 30 + n
        assert engine.tokens == [*ids, *whole][: len(engine.tokens)]
        guessed += engine.n_guessed
        engine.guessing = False
        del engine.look_up
        assert list(engine.generate(ids + whole[:n], GREEDY, max_tokens=5)) == whole[n : n + 5]
    assert guessed > 50


def test_statistics_count_guesses() -> None:
    model = kimi_lite.load(vram=0)
    engine = model.engine
    drawn = model.ask(QUESTION, logprobs=0).logprobs
    assert drawn is not None
    ids = [token.id for token in drawn]
    engine.look_up = lambda room: Told(engine.tokens, room, ids)  # type: ignore[method-assign]
    answer = model.ask(QUESTION, logprobs=0)
    assert answer.logprobs == drawn
    assert (answer.stats.guessed, answer.stats.guessed_right) == (engine.n_guessed, engine.n_right)
    assert 0 < engine.n_right < engine.n_guessed


def test_a_real_answer_says_how_many_guesses_were_right(files: dict[str, Path]) -> None:
    engine = Engine(files["int4"])
    ids = prompt(2, 30, below=4)
    plain = list(guessing(files["int4"], None).generate(ids, GREEDY, max_tokens=400))
    assert list(engine.generate(ids, GREEDY, max_tokens=400)) == plain
    assert 0 < engine.n_right <= engine.n_guessed


def lookup(tokens: Sequence[int], costs: dict[int, float] = CHEAP, n_plain: int = 1000) -> PromptLookup:
    return PromptLookup(tokens, 200, n_plain, costs)


def test_what_followed_the_longest_match_is_guessed() -> None:
    #  1 2 3 stood twice; in front of the first stood 9, as it does now, so what followed that one is guessed.
    tokens = [9, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 9, 1, 2, 3]
    assert lookup(tokens).guess(MOST_GUESSES) == [4, 5, 6, 7, 8, 10, 11]
    assert lookup([*tokens[:-4], 8, 1, 2, 3]).guess(MOST_GUESSES) == [
        20,
        21,
        22,
        23,
        24,
        25,
        26,
    ]  # the later of two
    assert lookup(tokens).guess(3) == [4, 5, 6]
    assert lookup(tokens).guess(6) == [4, 5, 6]  # whole steps only: 4 tokens, not 7
    assert lookup(tokens).guess(0) == []


def test_too_short_a_match_is_none() -> None:
    for n in range(LEAST + 2):
        assert lookup([5] * n).guess(7) == ([] if n <= LEAST else [5] * 7)
    assert lookup([1, 2, 3, 4, 0, 2, 3]).guess(7) == []
    assert lookup([1, 2, 3, 4, 1, 2, 3]).guess(7) == [4, 1, 2, 3, 4, 1, 2]  # a run that repeats goes on


def test_tokens_that_are_added_are_matched_and_control_tokens_never_guessed() -> None:
    it = lookup([1, 2, 3, 4, 5, 1000, 6, 50])
    for token in (1, 2, 3):
        assert it.guess(7) == []
        it.add(token)
    assert it.guess(7) == [4]  # not the 5 in front of the control token: a step has 2, 4 or 8 tokens
    it.add(4)
    it.add(5)
    assert it.guess(7) == []


def test_guesses_are_made_where_they_pay() -> None:
    # m agreed: p = m / (m + 1). Three: 1.75 tokens in 1.48 beat one; 2.73 in 2.30 beat that. Then 3.6 in 3.52 do not.
    three = [7, 1, 2, 3, *range(30, 40), 8, 1, 2, 3]
    assert lookup(three, BYTES).guess(7) == [30, 31, 32]
    assert lookup(three, {2: 1.48, 4: 3.0, 8: 9.0}).guess(7) == [30]
    assert lookup(three, {2: 1.8, 4: 3.0, 8: 9.0}).guess(7) == []
    # Twenty: 0.952 each, 6.8 tokens in 3.52.
    twenty = [*range(50, 70), *range(30, 40), *range(50, 70)]
    assert lookup(twenty, BYTES).guess(7) == list(range(30, 37))


def test_the_record_of_an_answer_stops_and_restores_guesses() -> None:
    it = lookup([7, 1, 2, 3, *range(30, 40), 8, 1, 2, 3], BYTES)
    for _ in range(3):
        assert it.guess(7)
        it.checked(3, 0)
    assert it.guess(7) == []  # 3 of 3 + 1 + 2.71 is 0.447: 1.447 tokens do not beat 1.48
    for _ in range(3):
        it.checked(7, 7)
    assert it.guess(7) == list(range(30, 37))


def test_what_steps_took_counts_more_than_what_their_bytes_say() -> None:
    def tried(two_times: int, four: float) -> PromptLookup:
        it = lookup([7, 1, 2, 3, *range(30, 40), 8, 1, 2, 3], {2: 9.0, 4: 2.3, 8: 9.0})
        it.took(1, 1.0)
        it.took(3, 0.001)  # no length of ours
        for _ in range(two_times):
            it.took(4, four)
        return it

    assert tried(0, 5.0).guess(7) == [30, 31, 32]
    assert tried(1, 5.0).guess(7) == [30, 31, 32]  # one slow step may be chance
    assert tried(2, 5.0).guess(7) == []
    slow_then_quick = tried(2, 5.0)
    slow_then_quick.took(4, 2.0)
    assert slow_then_quick.guess(7) == [30, 31, 32]  # what disturbs only slows
    for _ in range(4):
        slow_then_quick.took(4, 5.0)  # but only the last four are known
    assert slow_then_quick.guess(7) == []


def test_bytes_of_a_step_are_those_of_the_experts_that_its_tokens_meet(files: dict[str, Path]) -> None:
    weights = open_weights(files["int4"])
    c = weights.config
    all_pairs = list(itertools.combinations(range(c.n_experts), c.n_active))
    met = np.mean([len({*a, *b}) for a in all_pairs for b in all_pairs])
    assert weights.step_bytes(2) == pytest.approx(
        weights.fixed_bytes + weights.routed_bytes * met / c.n_experts, abs=1
    )
    assert weights.step_bytes(1) == pytest.approx(
        weights.fixed_bytes + weights.routed_bytes * c.n_active / c.n_experts, abs=1
    )
    assert weights.step_bytes(1000) == weights.fixed_bytes + weights.routed_bytes
