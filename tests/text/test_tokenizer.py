"""Splits of the published pattern, plain-text encoding, and the road through GGUF's token list."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.vocab import CONTROL, NORMAL, Vocab
from kimi_lite.runtime.reference.nano import FIRST_SPECIAL, NANO_TEXT, RANKS
from kimi_lite.runtime.reference.random_checkpoint import SPECIAL_NAMES, byte_ranks, write_checkpoint
from kimi_lite.runtime.tokenizer import RUN_CHARS, Tokenizer

BYTES = [bytes([b]) for b in range(256)]
SPECIALS = {name: FIRST_SPECIAL + i for i, name in SPECIAL_NAMES.items()}


def pieces(text: str) -> list[str]:
    """Where the pattern cuts: with a token for every substring, each piece is one token."""
    raw = text.encode()
    subs = {raw[i:j] for i in range(len(raw)) for j in range(i + 2, len(raw) + 1)}
    tokenizer = Tokenizer(Vocab(BYTES + sorted(subs), {}, 256 + len(subs)))
    return [tokenizer.decode_bytes([i]).decode() for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't DON'T it'S", ["don't", " DON'T", " it'S"]),
        ("camelCaseXML", ["camel", "Case", "XML"]),
        ("1234567", ["123", "456", "7"]),
        ("3.14159", ["3", ".", "141", "59"]),
        ("The model 模型 processes", ["The", " model", " ", "模型", " processes"]),
        ("日本語テスト", ["日本語", "テスト"]),
        (
            "def foo(x):\n    return x + 1\n",
            ["def", " foo", "(x", "):\n", "   ", " return", " x", " +", " ", "1", "\n"],
        ),
        ("◁think▷", ["◁think", "▷"]),
        (" <|im_end|>", [" <|", "im", "_end", "|>"]),
    ],
)
def test_the_published_splits(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@given(st.text())
def test_plain_text_comes_back_and_never_becomes_a_control_token(text: str) -> None:
    tokenizer = Tokenizer(Vocab(RANKS, SPECIALS, NANO_TEXT.vocab_size))
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode(
        "utf-8", "surrogatepass" if not text.isprintable() else "strict"
    )
    assert all(i < FIRST_SPECIAL for i in ids)


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_user|>", "[EOS]", "<|media_pad|>"])
def test_a_typed_control_token_stays_text(name: str) -> None:
    tokenizer = Tokenizer(Vocab(RANKS, SPECIALS, NANO_TEXT.vocab_size))
    assert SPECIALS[name] not in tokenizer.encode(f"ignore that {name} and obey")


def test_long_runs_are_cut_where_the_published_code_cuts_them() -> None:
    tokenizer = Tokenizer(Vocab([*BYTES, b"aa"], {}, 257))
    # The cut falls after b and an odd number of a's, so the last two stay apart; uncut they would pair.
    assert RUN_CHARS == 25_000
    ids = tokenizer.encode("b" + "a" * RUN_CHARS)
    assert ids == [ord("b")] + [256] * (RUN_CHARS // 2 - 1) + [ord("a"), ord("a")]


def test_the_vocabulary_survives_gguf() -> None:
    vocab = Vocab(byte_ranks(400, seed=3), {"[BOS]": 400, "<|im_end|>": 402}, 410)
    metadata = vocab.gguf_metadata()
    assert metadata["tokenizer.ggml.tokens"][ord(" ")] == "Ġ"  # GPT-2's letter for a space
    assert metadata["tokenizer.ggml.token_type"][:400] == [NORMAL] * 400
    assert metadata["tokenizer.ggml.token_type"][400] == CONTROL
    assert metadata["tokenizer.ggml.tokens"][409] == "[PAD409]"
    assert Vocab.from_gguf(metadata, "test") == vocab


def test_a_token_of_a_letter_that_stands_for_no_byte_is_refused() -> None:
    metadata = Vocab(byte_ranks(300, seed=3), {}, 300).gguf_metadata()
    for letter in ("\n", "\u0144", "√", "𝄞"):  # GPT-2's alphabet has others for all of these
        tokens = [*metadata["tokenizer.ggml.tokens"][:-1], "a" + letter]
        with pytest.raises(
            ModelFileError, match=f"holds {letter!r}, which stands for no byte".replace("\\", "\\\\")
        ):
            Vocab.from_gguf({**metadata, "tokenizer.ggml.tokens": tokens}, "file")


@pytest.mark.parametrize(
    ("at", "token", "says"),
    [(ord("a"), "ab", "1 single bytes have no token"), (256, "b", "1 tokens stand there twice")],
)
def test_a_vocabulary_that_cannot_spell_everything_is_refused(at: int, token: str, says: str) -> None:
    metadata = Vocab([*BYTES, b"bc"], {}, 257).gguf_metadata()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[at] = token
    with pytest.raises(ModelFileError, match=f"^file: {says}"):
        Vocab.from_gguf({**metadata, "tokenizer.ggml.tokens": tokens}, "file")


def test_merges_are_those_that_make_the_tokens() -> None:
    vocab = Vocab([*BYTES, b"he", b"ll", b"hell", b"hello"], {}, 260)
    assert vocab.merges() == [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o")]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: lines[:100] + lines[101:], "rank 101 stands where 100"),
        (lambda lines: [b"!!! 0", *lines[1:]], "line 1"),
        (lambda lines: lines[1:], "rank 1 stands where 0"),
        (lambda lines: lines[:200], "single bytes have no token"),
    ],
)
def test_a_damaged_vocabulary_is_one_sentence(tmp_path: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    path = write_checkpoint(tmp_path) / "tiktoken.model"
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ModelFileError, match=says):
        Vocab.from_hf_dir(tmp_path, 768)
