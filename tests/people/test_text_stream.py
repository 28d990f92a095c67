"""Splitting thinking from answer must not depend on where tokens cut the bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.text_stream import CLOSE, OPEN, TextStream


def run(chunks: list[bytes], stop: tuple[str, ...] = (), *, keep_end: bool = False) -> tuple[str, str, bool]:
    stream, parts = TextStream(stop, keep_end=keep_end), {"thinking": "", "answer": ""}
    for chunk in chunks:
        for kind, text in stream.feed(chunk):
            parts[kind] += text
    for kind, text in stream.finish():
        parts[kind] += text
    return parts["thinking"], parts["answer"], stream.stopped


def test_a_limit_leaves_no_half_mark_and_no_half_character_behind() -> None:
    raw = f"{OPEN}whÿ{CLOSE}becauſe".encode()
    for n in range(len(raw)):
        stream, parts = TextStream(), {"thinking": "", "answer": ""}
        for kind, text in (*stream.feed(raw[:n]), *stream.finish(cut=True)):
            parts[kind] += text
        said = raw[:n].decode(errors="ignore")
        thinking, _, answer = said.removeprefix(OPEN).partition(CLOSE) if said.startswith(OPEN) else ("",) * 3
        assert parts == {"thinking": thinking.partition("◁")[0], "answer": answer}, n


@pytest.mark.parametrize(
    ("output", "thinking", "answer"),
    [
        (f"{OPEN}why{CLOSE}because", "why", "because"),
        (f"{OPEN}\n why \n{CLOSE}\n\n because \n", "why", "because"),
        ("just an answer", "", "just an answer"),
        (f"{OPEN}cut off inside", "cut off inside", ""),
        (f"{OPEN}a{CLOSE}b{CLOSE}c", "a", f"b{CLOSE}c"),  # only the first closing mark counts
        (f"{OPEN}a{OPEN}b{CLOSE}c", f"a{OPEN}b", "c"),
        (f"x{OPEN}y{CLOSE}z", "", f"x{OPEN}y{CLOSE}z"),  # not at the beginning: text
        ("◁thin", "", "◁thin"),
        ("", "", ""),
        (f"{OPEN}{CLOSE}", "", ""),
        (f"{OPEN}a ◁/thin b{CLOSE}c", "a ◁/thin b", "c"),
    ],
)
def test_the_split(output: str, thinking: str, answer: str) -> None:
    raw = output.encode()
    for size in (1, 2, 3, 5, len(raw) or 1):
        found = run([raw[i : i + size] for i in range(0, len(raw), size)])
        assert found == (thinking, answer, False)


def test_white_space_behind_an_answer_is_kept_where_it_was_asked_for() -> None:
    raw = f" {OPEN} a {CLOSE} \n b \n".encode()
    for size in (1, 3, len(raw)):
        chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert run(chunks, keep_end=True) == ("a", "b \n", False), size


marked = st.lists(
    st.sampled_from([OPEN, CLOSE, "◁", "▷", "/think", " ", "\n", "é", "模", "a", "STOP", "ST", "OP"]),
    max_size=12,
)


@given(marked, st.lists(st.integers(0, 200), max_size=12), st.booleans())
def test_no_cut_changes_the_result(pieces: list[str], cuts: list[int], stopping: bool) -> None:
    raw = "".join(pieces).encode()
    edges = sorted({0, len(raw), *(c for c in cuts if c < len(raw))})
    chunks = [raw[a:b] for a, b in itertools.pairwise(edges)]
    stop = ("STOP",) if stopping else ()
    assert run(chunks, stop) == run([raw], stop)


def test_a_stop_text_ends_the_answer_and_is_left_out_even_across_tokens() -> None:
    assert run([b"one ST", b"OP two"], ("STOP",)) == ("", "one", True)
    assert run([f"{OPEN}STOP{CLOSE}x".encode()], ("STOP",)) == (
        "STOP",
        "x",
        False,
    )  # thinking is not searched


def test_text_is_held_back_no_longer_than_it_must_be() -> None:
    stream = TextStream(("STOP",))
    assert list(stream.feed(b"hello S")) == [("answer", "hello")]
    assert list(stream.feed(b"un")) == [("answer", " Sun")]


def test_a_character_cut_in_two_is_never_shown_broken() -> None:
    stream = TextStream()
    raw = "é".encode()
    assert list(stream.feed(raw[:1])) == []
    assert list(stream.feed(raw[1:])) == [("answer", "é")]
    assert run([raw[:1]]) == ("", "\ufffd", False)  # nothing more came
