"""The Python interface and the commands, on the shipped small model."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import command
from numpy.typing import NDArray
from terminal import talk_in_a_terminal

import kimi_lite
from kimi_lite.doctor import machine_report
from kimi_lite.errors import ModelFileError, UsageError
from kimi_lite.runtime import kernels
from kimi_lite.runtime.sampling import Sampler, SamplingOptions

LONG = 'Reverse "planet".'


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load()


def test_the_public_names_are_those_that_are_listed() -> None:
    assert all(getattr(kimi_lite, name) is not None for name in kimi_lite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kimi_lite.nothing  # noqa: B018
    assert (Path(kimi_lite.__file__).parent / "py.typed").exists()


def test_streaming_equals_the_whole_answer(model: kimi_lite.Model) -> None:
    model.clear()
    events = list(model.chat(LONG))
    whole = model.ask(LONG)
    assert "".join(e.text for e in events if e.kind == "answer") == whole.text
    assert "".join(e.text for e in events if e.kind == "thinking") == whole.thinking != ""
    assert events[-1].kind == "done"
    assert events[-1].reason == whole.reason == "stop"


@pytest.mark.parametrize("seed", range(4))
def test_a_file_that_is_damaged_somewhere_answers_or_is_refused_in_one_sentence(
    tmp_path: Path, seed: int
) -> None:
    whole = (Path(kimi_lite.__file__).parent / "nano/kimi-vl-nano-int4.gguf").read_bytes()
    head = whole.index(b"\0" * 2048)  # the padding in front of the weights
    rng, said = np.random.default_rng(seed), list[str]()
    for _ in range(100):
        raw = bytearray(whole)
        for at in rng.integers(0, head, rng.integers(1, 4)):
            raw[at] = rng.integers(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(raw if rng.random() < 0.8 else raw[: rng.integers(len(raw))])
        try:
            kimi_lite.load(path).ask(LONG, max_tokens=2)
        except ModelFileError as error:
            said.append(str(error))
        path.unlink()
    assert said
    assert [text for text in said if "\n" in text] == []


def test_a_conversation_is_kept_without_its_thinking(model: kimi_lite.Model) -> None:
    model.clear()
    list(model.chat("What is 12 + 34?"))
    events = list(model.chat("Who are you?"))
    contents = [m.content for m in model.conversation.messages]
    assert contents[0] == "What is 12 + 34?"
    assert len(contents) == 4
    assert not any("think" in str(c) for c in contents)
    assert events[-1].stats is not None
    assert events[-1].stats.reused > 20  # the first turn was not computed again
    fresh = kimi_lite.load()
    fresh.conversation.messages = model.conversation.messages[:2]
    assert [e.text for e in fresh.chat("Who are you?")] == [e.text for e in events]


def test_cancelling_keeps_what_was_said(model: kimi_lite.Model) -> None:
    model.clear()
    events = model.chat(LONG)
    first = next(events)
    events.close()  # type: ignore[attr-defined]
    assert model.conversation.messages[0].content == LONG
    assert model.conversation.thinking == [first.text]
    assert list(model.chat("What is 12 + 34?"))[-1].reason == "stop"


def test_a_thinking_budget_closes_the_chain_and_answers(model: kimi_lite.Model) -> None:
    free, short = model.ask(LONG), model.ask(LONG, thinking_budget=6)
    assert len(short.thinking) < len(free.thinking)
    assert short.text
    assert "think" not in short.text


def test_a_reply_cut_inside_its_thinking_has_no_answer(model: kimi_lite.Model) -> None:
    cut = model.ask(LONG, max_tokens=6)
    assert cut.text == ""
    assert cut.thinking
    assert cut.reason == "length"


def test_a_stop_text_ends_the_answer(model: kimi_lite.Model) -> None:
    whole = model.ask("Who are you?")
    cut = model.ask("Who are you?", stop=["nano"])
    assert whole.text.partition("nano")[0].rstrip() == cut.text


def test_asynchronous_events_are_the_same(model: kimi_lite.Model) -> None:
    import asyncio

    model.clear()
    expected = [e.text for e in model.chat(LONG)]
    model.clear()

    async def collect() -> list[str]:
        return [e.text async for e in model.achat(LONG)]

    assert asyncio.run(collect()) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"images": ["/nowhere/x.png"]}, "/nowhere/x.png: not found"),
        ({"images": "photo.png"}, "images is a single text"),
        ({"text": "  "}, "the question is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": [""]}, "a stop text is empty"),
    ],
)
def test_a_request_that_cannot_be_is_one_sentence(
    model: kimi_lite.Model, arguments: dict[str, object], says: str
) -> None:
    text = str(arguments.pop("text", "x"))
    with pytest.raises(UsageError, match=says):
        model.ask(text, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"min_p": 1}, {"top_k": -1}, {"seed": -1}]
)
def test_sampling_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_filters_keep_what_they_say() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))

    def drawn(**options: float) -> set[int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=0, **options), 4)  # type: ignore[arg-type]
        return {sampler.draw(logits, []) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(min_p=0.29) == {0, 1, 2}
    greedy = Sampler(SamplingOptions(logit_bias={3: 9.0}), 4)
    assert greedy.draw(logits, []) == 3
    assert Sampler(SamplingOptions(repetition_penalty=5), 4).draw(logits, [0]) != 0
    counts = np.bincount(
        [Sampler(SamplingOptions(temperature=1, seed=s), 4).draw(logits, []) for s in range(2000)]
    )
    # Each share is within five standard deviations of its probability.
    p = np.array([0.5, 0.25, 0.15, 0.1])
    assert (np.abs(counts / 2000 - p) < 5 * np.sqrt(p * (1 - p) / 2000)).all()


def sorted_whole(logits_V: NDArray[np.float32], o: SamplingOptions) -> tuple[list[int], NDArray[np.float64]]:
    """Which tokens the filters keep, and their shares, by the definition: everything sorted, then cut three times."""
    p_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / o.temperature)
    ids = sorted(range(len(p_V)), key=lambda i: (-float(logits_V[i]), i))[: o.top_k or None]
    shares = [p_V[i] / p_V[ids].sum() for i in ids]
    sums = np.cumsum(shares)
    n = sum(
        1 for k in range(len(ids)) if (k == 0 or sums[k - 1] < o.top_p) and shares[k] >= o.min_p * shares[0]
    )
    return ids[:n], np.array(shares[:n]) / sum(shares[:n])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_k": 700},
        {"top_k": 5000},
        {"top_p": 0.8},
        {"top_p": 0.999999},
        {"min_p": 0.05},
        {"min_p": 1e-13},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 900, "top_p": 0.9999999, "min_p": 1e-8},
    ],
)
@pytest.mark.parametrize(
    "spread", [0.0, 1.0, 8.0, 300.0]
)  # of the logits: all alike, flat, a model's, only one counts
def test_what_is_kept_does_not_depend_on_how_much_was_sorted(
    options: dict[str, float], spread: float
) -> None:
    random = np.random.default_rng(3)
    logits_V = (random.integers(-64, 64, 2999) / 64 * spread).astype(np.float32)  # with many ties
    o = SamplingOptions(temperature=0.7, seed=5, **options)  # type: ignore[arg-type]
    sampler, uniform = Sampler(o, len(logits_V)), np.random.Generator(np.random.PCG64(5))
    ids, shares = sorted_whole(logits_V, o)
    if not options:  # nothing to cut, so nothing is sorted
        shares, ids = shares[np.argsort(ids)], sorted(ids)
    expected = [ids[int(np.searchsorted(np.cumsum(shares), uniform.random()))] for _ in range(200)]
    assert [sampler.draw(logits_V, []) for _ in range(200)] == expected


def test_ask_prints_the_answer_alone() -> None:
    done = command("ask", LONG)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "think" not in done.stdout
    assert "kimi-vl-nano" in done.stderr
    assert "tok/s" in done.stderr
    assert "letters:" not in done.stderr  # thinking is not shown to a pipe
    assert "letters:" in command("ask", "--show-thinking", LONG).stderr
    assert command("ask", "-q", LONG).stderr == ""


def test_ask_puts_standard_input_before_the_question() -> None:
    assert command("ask", "-q", text=LONG).stdout == command("ask", "-q", LONG).stdout


def test_ask_json_is_one_object() -> None:
    reply = json.loads(command("ask", "--json", "-q", LONG).stdout)
    assert reply["schema"] == "kimi-lite/1"
    assert reply["answer"] == command("ask", "-q", LONG).stdout.strip()
    assert reply["thinking"].startswith("letters:")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ask"], 2, "no question"),
        (["ask", "--max-tokens", "6", LONG], 7, "cut off inside its thinking"),
        (["ask", "--max-tokens", "1", LONG], 7, "cut off inside its thinking"),
        (["ask", "-m", "/nowhere/model.gguf", "x"], 3, "/nowhere/model.gguf: not found"),
        (["ask", "--context", "999999", "x"], 2, "allows 1 to 8192"),
        (["ask", "--context", "8", "a question of more than eight tokens"], 2, "the context holds 8"),
        (["ask", "--threads", "0", "x"], 2, "0 threads"),
        (["ask", "--temperature", "-1", "x"], 2, "temperature is -1"),
        (["ask", "--nonsense"], 2, "No such option"),
        (["chat"], 2, "needs a terminal"),
        (["info", str(Path(__file__))], 3, "this is not a GGUF file"),
    ],
)
def test_bad_usage_is_one_sentence_and_a_code(arguments: list[str], code: int, says: str) -> None:
    done = command(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_and_info_speak() -> None:
    doctor = command("doctor").stdout
    assert "kernels" in doctor
    assert "not in use" in doctor
    for line in ("pages ", "guesses "):
        assert f"\n{line}" in doctor
    assert "not the fastest" in command("doctor", KIMI_LITE_ISA="scalar").stdout
    info = command("info", str(Path(kimi_lite.__file__).parent / "nano" / "kimi-vl-nano-int4.gguf")).stdout
    assert "q4b32" in info


@pytest.mark.parametrize(("best", "lacks"), [("zen4", False), ("avx512vnni", False), ("avx2", True)])
def test_doctor_says_which_processors_lack_the_fastest_kernels(
    best: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "usable_isas", lambda: [best, "scalar"])
    monkeypatch.setattr(kernels, "isa", lambda: best)
    assert any("this processor has no avx512vnni" in line for line in machine_report()) is lacks


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m kimi_lite ask -q {LONG!r} | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.strip() in ("0", "141")  # whoever is first
    assert "Traceback" not in done.stderr


def test_chat_answers_knows_its_commands_and_leaves() -> None:
    screen, code = talk_in_a_terminal(
        (4, b"Who are you?\r"), (2, b"/stats\r"), (1, b"/nonsense\r"), (1, b"\x04")
    )
    assert code == 0
    assert "kimi-vl-nano, a small model" in screen
    assert "tok/s" in screen
    assert "/nonsense is not a command" in screen


@pytest.mark.parity
@pytest.mark.parametrize(
    ("question", "answer"), [("What is 38 + 47?", "85"), ("Spell: planet", "p-l-a-n-e-t")]
)
def test_nano_answers(question: str, answer: str) -> None:
    started = time.monotonic()
    assert command("ask", "-q", question).stdout.strip() == answer
    assert time.monotonic() - started < 20  # a hang, not a speed
