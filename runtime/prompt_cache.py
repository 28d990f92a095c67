"""Conversations that another one has pushed out of the latent cache, kept in memory until they go on.

The cache holds one sequence of tokens. Programs that ask a server put questions of their own between two turns of a chat (for its
title, for what to ask next), or hold several chats at once; each of these pushes the one before it out, whose 4,000 tokens take two
cores half a minute to read again. So what is about to go is copied, some 16.5 kB a token at full size, and what a new prompt shares
most with is copied back, which takes a few milliseconds a thousand tokens. Bits are those of what was computed.

Beyond `most_bytes` those that were used least recently go. Only latents are kept, of pictures no pixels and no embeddings.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kimi_lite.runtime.cache import LatentCache

WORTH = 32  # tokens: fewer are read again as fast


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What each token stands for, as an engine compares them, and each layer's row blocks: uint8 [L, bytes]."""

    seen: list[object]
    rows: NDArray[np.uint8]


class PromptCache:
    """Of one engine."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[Kept] = []  # used least recently first

    @property
    def n_bytes(self) -> int:
        return sum(kept.rows.nbytes for kept in self._kept)

    def exchange(self, seen: list[object], wanted: Sequence[object], cache: LatentCache) -> int:
        """Make the cache, which holds `seen`, hold as much as it can of the beginning of `wanted`, and nothing else; how much."""
        n = shared(seen, wanted)
        found = max(self._kept, key=lambda kept: shared(kept.seen, wanted), default=None)
        longest = shared(found.seen, wanted) if found else 0
        if found and longest >= n + WORTH:
            self._kept.remove(found)
            self._kept.append(found)  # used now
        if len(seen) - n >= WORTH:
            self._keep(seen, cache)
        if not found or longest < n + WORTH:
            cache.rewind(n)
            return n
        cache.rewind(0)
        for layer, rows in zip(cache.rows(0, longest), found.rows, strict=True):
            layer[:] = rows[: layer.size]
        cache.adopt(0, longest)
        return longest

    def _keep(self, seen: list[object], cache: LatentCache) -> None:
        """Copy all that the cache holds, unless it is here, or more than is allowed."""
        if any(kept.seen[: len(seen)] == seen for kept in self._kept):
            return
        rows = cache.rows(0, len(seen))
        n_bytes = sum(layer.nbytes for layer in rows)
        if n_bytes > self.most_bytes:
            return
        self._kept = [
            kept for kept in self._kept if kept.seen != seen[: len(kept.seen)]
        ]  # those it goes on from
        while self._kept and self.n_bytes + n_bytes > self.most_bytes:
            self._kept.pop(0)  # before the copy is made, so that memory never holds more
        with contextlib.suppress(MemoryError):  # then it is read again
            self._kept.append(Kept(seen, np.stack(rows)))


def shared(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """Length of the beginning that two sequences share."""
    n = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        n += 1
    return n
