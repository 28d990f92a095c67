"""The vocabulary: byte strings in rank order, then named control tokens.

Published form: `tiktoken.model`, one `base64(bytes) rank` a line, and `tokenizer_config.json`, whose
`added_tokens_decoder` names the control tokens that follow. GGUF form: every token written with GPT-2's printable
alphabet for bytes, plus the merge that makes each token, which byte-pair programs without ranks need.
"""

import base64
import binascii
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.config import read_json

N_SPECIALS = 256  # control tokens of a published vocabulary, named or reserved
NORMAL, CONTROL, UNUSED = 1, 3, 5  # GGUF's token types


@cache
def _byte_alphabet() -> tuple[dict[int, str], dict[str, int]]:
    """GPT-2's printable character for each byte, and back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    to_char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return to_char, {c: b for b, c in to_char.items()}


def _check(ranks: list[bytes], where: Path | str) -> None:
    """Every text has tokens, and every token another id: tiktoken takes both for granted."""
    found = set(ranks)
    missing = 256 - sum(bytes([b]) in found for b in range(256))
    if missing:
        raise ModelFileError(f"{where}: {missing} single bytes have no token; the file is damaged")
    if len(found) < len(ranks):
        raise ModelFileError(
            f"{where}: {len(ranks) - len(found)} tokens stand there twice; the file is damaged"
        )


@dataclass(frozen=True)
class Vocab:
    """Ids 0…len(ranks)-1 are `ranks`; `specials` maps a control token's name to its id; `size` rows in all."""

    ranks: list[bytes]
    specials: dict[str, int]
    size: int

    @classmethod
    def from_hf_dir(cls, directory: Path, size: int) -> "Vocab":
        """Read `tiktoken.model` and `tokenizer_config.json`. `size` is the model's vocab_size."""
        path = directory / "tiktoken.model"
        ranks: list[bytes] = []
        try:
            lines = path.read_bytes().splitlines()
            for line in lines:
                token, _, rank = line.partition(b" ")
                if int(rank) != len(ranks):
                    raise ModelFileError(f"{path}: rank {int(rank)} stands where {len(ranks)} was expected")
                ranks.append(base64.b64decode(token, validate=True))
        except FileNotFoundError:
            raise ModelFileError(f"{path}: not found; a checkpoint directory must hold it") from None
        except (OSError, ValueError, binascii.Error) as error:
            raise ModelFileError(f"{path}: line {len(ranks) + 1} is not `base64 rank` ({error})") from None
        _check(ranks, path)
        if len(ranks) > size:
            raise ModelFileError(f"{path}: {len(ranks)} ranks, but the model has a vocabulary of {size}")
        config = directory / "tokenizer_config.json"
        specials = {
            f"<|reserved_token_{i}|>": i for i in range(len(ranks), min(len(ranks) + N_SPECIALS, size))
        }
        named = read_json(config).get("added_tokens_decoder", {})
        try:
            names = {int(i): str(entry["content"]) for i, entry in named.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModelFileError(
                f"{config}: added_tokens_decoder must map ids to objects with a content"
            ) from None
        for i, name in sorted(names.items()):
            if not len(ranks) <= i < size:
                raise ModelFileError(f"{config}: token {name!r} has id {i}, outside {len(ranks)}…{size - 1}")
            specials.pop(f"<|reserved_token_{i}|>", None)
            specials[name] = i
        return cls(ranks, specials, size)

    def gguf_metadata(self) -> dict[str, Any]:
        """`tokenizer.ggml.*` keys but for the ids of begin, end and padding."""
        to_char, _ = _byte_alphabet()
        tokens = ["".join(to_char[b] for b in token) for token in self.ranks]
        types = [NORMAL] * len(tokens)
        names = {i: name for name, i in self.specials.items()}
        for i in range(len(tokens), self.size):
            tokens.append(names.get(i, f"[PAD{i}]"))
            types.append(CONTROL if i in names else UNUSED)
        merges = [" ".join("".join(to_char[b] for b in part) for part in pair) for pair in self.merges()]
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "kimi-k2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> "Vocab":
        """Rebuild ranks and control tokens from `tokenizer.ggml.*`; merges follow from the ranks."""
        tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
        if tokens is None or types is None or len(tokens) != len(types):
            raise ModelFileError(
                f"{where}: tokenizer.ggml.tokens and token_type are missing or differ in length"
            )
        if metadata.get("tokenizer.ggml.model") != "gpt2" or metadata.get("tokenizer.ggml.pre") != "kimi-k2":
            raise ModelFileError(
                f"{where}: the tokenizer is not Kimi's (tokenizer.ggml.pre should be 'kimi-k2')"
            )
        _, to_byte = _byte_alphabet()
        n_ranks = next((i for i, kind in enumerate(types) if kind != NORMAL), len(tokens))
        text = "".join(tokens[:n_ranks])
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)  # all at once: a million of them
        byte_of = np.full(sys.maxunicode + 1, -1, np.int16)
        byte_of[[*map(ord, to_byte)]] = [*to_byte.values()]
        values = byte_of[codes]
        if (values < 0).any():
            wrong = text[int(np.argmax(values < 0))]
            raise ModelFileError(f"{where}: a token holds {wrong!r}, which stands for no byte")
        raw, ends = values.astype(np.uint8).tobytes(), accumulate(map(len, tokens[:n_ranks]), initial=0)
        ranks = [raw[start:end] for start, end in pairwise(ends)]
        _check(ranks, where)
        specials = {tokens[i]: i for i in range(n_ranks, len(tokens)) if types[i] != UNUSED}
        return cls(ranks, specials, len(tokens))

    def merges(self) -> list[tuple[bytes, bytes]]:
        """For each token of several bytes, in rank order, the last pair whose merge makes it.

        Running the byte-pair merge over the token with only lower ranks allowed ends in exactly two parts.
        """
        rank_of = {token: rank for rank, token in enumerate(self.ranks)}
        pairs = []
        for rank, token in enumerate(self.ranks):
            if len(token) == 1:
                continue
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                best = min(range(len(parts) - 1), key=lambda i: rank_of.get(parts[i] + parts[i + 1], rank))
                if rank_of.get(parts[best] + parts[best + 1], rank) >= rank:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            if len(parts) == 2:  # a token that no merge reaches is left to the programs that know ranks
                pairs.append((parts[0], parts[1]))
        return pairs
