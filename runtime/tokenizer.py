"""Text to tokens and back, with tiktoken and the model's own split pattern.

User text is always encoded as plain text: it can never become a control token, whatever it spells. Control tokens
are looked up by name. The published code cuts long texts into spans before encoding, which can move a token border;
the same cuts are made here.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import tiktoken

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.vocab import Vocab

if TYPE_CHECKING:
    from llguidance import LLTokenizer

PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
SPAN_CHARS = 400_000  # the published encoder's outer cut
RUN_CHARS = 25_000  # and its cut of runs that are all space or all non-space
STOP_NAMES = ("[EOS]", "<|im_end|>", "[EOT]")


class Tokenizer:
    """Encodes and decodes with one vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab
        self._encoding = tiktoken.Encoding(
            "kimi",
            pat_str=PATTERN,
            mergeable_ranks=dict(zip(vocab.ranks, range(len(vocab.ranks)), strict=True)),
            special_tokens={},
        )
        self._names = {i: name for name, i in vocab.specials.items()}

    @cached_property
    def for_grammars(self) -> "LLTokenizer":
        """The vocabulary as llguidance takes it."""
        from llguidance.tiktoken import lltokenizer_from_encoding

        return lltokenizer_from_encoding(
            self._encoding, n_vocab=self.vocab.size, eos_token=sorted(self.stop_ids)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens that the text spells stay text."""
        ids: list[int] = []
        for start in range(0, len(text), SPAN_CHARS):
            for piece in _split_runs(text[start : start + SPAN_CHARS]):
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def special(self, name: str) -> int:
        """The id of a control token by name."""
        try:
            return self.vocab.specials[name]
        except KeyError:
            raise ModelFileError(
                f"the vocabulary has no control token {name!r}; is this Kimi-VL or Moonlight?"
            ) from None

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ordinary tokens; control tokens and unused rows give nothing."""
        n = len(self.vocab.ranks)
        return b"".join(self.vocab.ranks[i] for i in ids if i < n)

    def name(self, token: int) -> str:
        """A token for people: its text, or its name if it is a control token."""
        if token < len(self.vocab.ranks):
            return self.vocab.ranks[token].decode("utf-8", "backslashreplace")
        return self._names.get(token, f"[unused {token}]")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn, as far as this vocabulary has them."""
        return frozenset(self.vocab.specials[n] for n in STOP_NAMES if n in self.vocab.specials)


def _split_runs(text: str) -> list[str]:
    """Cut runs of more than RUN_CHARS characters that are all white space or all not."""
    if len(text) <= RUN_CHARS:
        return [text] if text else []
    pieces, start = [], 0
    for run in re.finditer(r"\s+|\S+", text):
        begin, end = run.span()
        while end - begin > RUN_CHARS:
            begin += RUN_CHARS
            pieces.append(text[start:begin])
            start = begin
    return [*pieces, text[start:]] if start < len(text) else pieces
