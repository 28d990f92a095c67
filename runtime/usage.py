"""Which experts are used: how often each was chosen for a decoded token, kept between runs.

The router chooses some experts more often than others, and which ones depends on what a person does with the model. Those
that are used most belong on the card. Counted are tokens that come alone, as decoding has them: a picture's thousand
tokens read every expert once, whatever they choose, and say nothing of what decoding will need.

A model is known by its first router, so all its quantizations share one entry, a small file in a private directory:

    b"KLUSAGE1" · layers and experts, two little-endian u32 · SHA-256 of the counts · the counts, u64 [L, E]

A file that is short, altered or unreadable counts as absent, and the directory may be deleted at any time. Counts are
halved when a layer's reach HALVE_AT, so that what was asked lately weighs more. KIMI_LITE_EXPERT_USAGE names another
directory, or is `off`.

Dimension key:  L layers with routed experts   E routed experts
"""

import contextlib
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.runtime.directories import cache_directory, written
from kimi_lite.runtime.weights import Weights

MAGIC = b"KLUSAGE1"
HEAD = struct.Struct("<8sII32s")
HALVE_AT = 1 << 20  # choices in one layer: at 6 a token, some 170,000 tokens
MAX_ENTRIES = 64  # models; those that were used least recently go
Counts = NDArray[np.int64]


def default_directory() -> Path | None:
    """Where entries go: the user's cache directory, KIMI_LITE_EXPERT_USAGE, or nowhere."""
    return cache_directory("experts", "KIMI_LITE_EXPERT_USAGE")


def load_usage(weights: Weights, directory: Path | None) -> Counts:
    """How often each expert was chosen, int64 [L, E]; zeros if nothing is known."""
    live = [layer.feed_forward.used_E for layer in weights.layers if layer.feed_forward.used_E is not None]
    counts_LE = np.stack(live) if live else np.zeros((0, 0), np.int64)
    if directory is None or not live:
        return counts_LE
    try:
        raw = (directory / entry_name(weights)).read_bytes()
        magic, L, E, digest = HEAD.unpack_from(raw)
    except (OSError, struct.error):
        return counts_LE
    body = raw[HEAD.size :]
    same = (magic, (L, E), len(body)) == (MAGIC, counts_LE.shape, 8 * counts_LE.size)
    if not same or hashlib.sha256(body).digest() != digest:
        return counts_LE
    return counts_LE + np.frombuffer(body, "<u8").astype(np.int64).reshape(L, E)


def save_usage(weights: Weights, directory: Path | None) -> None:
    """Add what was counted since the last time. Trouble with the disk is no trouble: the counts are kept for later."""
    live = [layer.feed_forward.used_E for layer in weights.layers if layer.feed_forward.used_E is not None]
    if directory is None or sys.is_finalizing() or not any(used_E.any() for used_E in live):
        return
    counts_LE = load_usage(weights, directory)
    if counts_LE.sum(1).max() >= HALVE_AT:
        counts_LE //= 2
    body = counts_LE.astype("<u8").tobytes()
    head = HEAD.pack(MAGIC, *counts_LE.shape, hashlib.sha256(body).digest())
    with contextlib.suppress(OSError):
        with written(directory / entry_name(weights)) as out:
            out.write(head + body)
        for used_E in live:
            used_E[:] = 0
        entries = sorted(directory.glob("*.usage"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in entries[MAX_ENTRIES:]:
            old.unlink()


def entry_name(weights: Weights) -> str:
    """The same for all files of one model."""
    router = next(f.router for f in (layer.feed_forward for layer in weights.layers) if f.router)
    return f"{hashlib.sha256(router.weight_ED.tobytes() + router.bias_E.tobytes()).hexdigest()[:32]}.usage"
