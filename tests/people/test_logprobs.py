"""Log-probabilities of what was drawn, from Python and from the command, and what is done where there are none."""

import json

import numpy as np
import pytest
from commands import command

import kimi_lite
from kimi_lite.errors import ModelFileError, UsageError
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.sampling import Sampler, SamplingOptions, likelihood

QUESTION = 'Reverse "planet".'


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load(vram=0)


def test_they_are_logarithms_of_shares() -> None:
    logits_V = np.log(np.array([0.1, 0.4, 0.3, 0.2, 77.0], np.float32))  # the fifth means nothing
    found = likelihood(logits_V, 3, 2, 4)
    # float32 logits of up to 2.3 are off by 2.3 * 2^-24 at most, and their sum of shares by as much again.
    assert found.logprob == pytest.approx(np.log(0.2), abs=3e-7)
    assert [token for token, _ in found.top] == [1, 2]
    assert [logprob for _, logprob in found.top] == pytest.approx(np.log([0.4, 0.3]), abs=3e-7)
    assert likelihood(logits_V, 0, 0, 4).top == ()
    assert [token for token, _ in likelihood(logits_V, 0, 9, 4).top] == [1, 2, 3, 0]
    even = np.zeros(6, np.float32)
    assert [token for token, _ in likelihood(even, 5, 3, 6).top] == [0, 1, 2]
    assert likelihood(np.array([5000, 0], np.float32), 1, 1, 2).logprob == -5000  # beside a certain token


def test_a_reply_is_its_tokens(model: kimi_lite.Model) -> None:
    answer = model.ask(QUESTION, logprobs=3)
    assert answer.logprobs is not None
    spelt = b"".join(token.bytes for token in answer.logprobs).decode()
    assert spelt == f"◁think▷{answer.thinking}◁/think▷{answer.text}"
    assert len(answer.logprobs) == answer.stats.tokens
    for token in answer.logprobs:  # greedy: each is the likeliest
        assert (token.id, token.bytes, token.logprob) == (
            token.top[0].id,
            token.top[0].bytes,
            token.top[0].logprob,
        )
        assert len(token.top) == 3
        assert 0 >= token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
        assert sum(np.exp(other.logprob) for other in token.top) <= 1 + 1e-9
    assert model.ask(QUESTION).logprobs is None
    model.clear()
    *_, done = model.chat(QUESTION, logprobs=3)
    assert done.logprobs == answer.logprobs


def test_they_are_the_models_whatever_was_drawn(model: kimi_lite.Model) -> None:
    # A temperature, a filter or a grammar chooses among tokens; what the model gave them stays.
    hot = model.ask(QUESTION, options=SamplingOptions(temperature=5, seed=1), max_tokens=20, logprobs=1)
    assert hot.logprobs is not None
    assert any(token.id != token.top[0].id for token in hot.logprobs)
    assert all(token.logprob <= token.top[0].logprob for token in hot.logprobs)
    held = model.ask(QUESTION, regex="[xyz]{5}", logprobs=0)
    assert held.logprobs is not None
    assert b"".join(token.bytes for token in held.logprobs).decode().endswith(held.text)
    assert min(token.logprob for token in held.logprobs) < -1


def test_guesses_change_none(model: kimi_lite.Model) -> None:
    engine = model.engine
    assert isinstance(engine, Engine)
    text = "Count the letters of: banana banana banana banana"
    guessed = model.ask(text, logprobs=2, max_tokens=60)
    engine.guessing = False
    try:
        plain = model.ask(text, logprobs=2, max_tokens=60)
    finally:
        engine.guessing = True
    assert guessed.logprobs == plain.logprobs


def test_a_closed_chain_of_thought_has_no_entry_for_the_mark(model: kimi_lite.Model) -> None:
    answer = model.ask(QUESTION, thinking_budget=5, logprobs=0)
    assert answer.logprobs is not None
    assert 0 < len(answer.logprobs) < answer.stats.tokens


def test_the_command_prints_them(model: kimi_lite.Model) -> None:
    reply = json.loads(command("ask", "--vram", "0", "--json", "--logprobs", "2", "-q", QUESTION).stdout)
    expected = model.ask(QUESTION, logprobs=2).logprobs
    assert expected is not None
    assert [entry["id"] for entry in reply["logprobs"]] == [token.id for token in expected]
    first = reply["logprobs"][0]
    assert bytes(first["bytes"]).decode() == first["text"] == expected[0].bytes.decode()
    assert first["logprob"] == expected[0].logprob
    assert [entry["id"] for entry in first["top"]] == [token.id for token in expected[0].top]
    assert "logprobs" not in json.loads(command("ask", "--json", "-q", QUESTION).stdout)


def test_what_cannot_be_is_one_sentence(model: kimi_lite.Model) -> None:
    done = command("ask", "--logprobs", "2", "-q", QUESTION)
    assert (done.returncode, done.stdout) == (2, "")
    assert "give both" in done.stderr
    with pytest.raises(UsageError, match="logprobs is 101; expected 0 to 100"):
        model.ask(QUESTION, logprobs=101)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_no_answer(wrong: float) -> None:
    logits_V = np.array([0.5, wrong, 0.25, np.nan], np.float32)
    for options in (SamplingOptions(), SamplingOptions(temperature=1, top_p=0.9, seed=1)):
        with pytest.raises(ModelFileError, match="not a number any more"):
            Sampler(options, 3).draw(logits_V, [])
        assert Sampler(options, 1).draw(logits_V, []) == 0  # padding may be anything
