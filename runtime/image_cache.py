"""Encoded pictures by content, in memory and on disk, so that a second question about a picture encodes nothing.

A key is the digest of the pixels that the tower sees, of the weights and of the arithmetic's version: two files that
decode to the same pixels share an entry, and a new model or release never reads an old one. On disk an entry is one
file in a private directory (0700, files 0600):

    b"KLIMAGE1" · tokens and width, two little-endian u32 · SHA-256 of the rows · the rows, float16

A file that is short, altered or unreadable counts as absent. The directory may be deleted at any time. Beyond
DISK_BYTES the entries that were used least recently go. KIMI_LITE_IMAGE_CACHE names another directory, or is `off`.

Dimension key:  M image tokens   D text width
"""

import contextlib
import hashlib
import os
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.runtime.directories import cache_directory, make_room, written

MAGIC = b"KLIMAGE1"
HEAD = struct.Struct("<8sII32s")
MEMORY_BYTES = 64 << 20  # 16 pictures of 1024 tokens at full width
DISK_BYTES = 512 << 20
Rows = NDArray[np.float16]


def default_directory() -> Path | None:
    """Where entries go: the user's cache directory, KIMI_LITE_IMAGE_CACHE, or nowhere."""
    return cache_directory("images", "KIMI_LITE_IMAGE_CACHE")


class ImageCache:
    """Looks in memory first, then on disk. Trouble with the disk never reaches the caller: it costs an encoding."""

    def __init__(
        self, directory: Path | None, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ):
        self.directory, self.memory_bytes, self.disk_bytes = directory, memory_bytes, disk_bytes
        self._memory: OrderedDict[str, Rows] = OrderedDict()

    def get(self, key: str) -> Rows | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        rows_MD = self._read(key)
        if rows_MD is not None:
            self._remember(key, rows_MD)
        return rows_MD

    def put(self, key: str, rows_MD: Rows) -> None:
        self._remember(key, rows_MD)
        if self.directory is None or rows_MD.nbytes > self.disk_bytes:
            return
        with contextlib.suppress(OSError):
            payload = rows_MD.tobytes()
            with written(self.directory / f"{key}.rows") as file:
                file.write(HEAD.pack(MAGIC, *rows_MD.shape, hashlib.sha256(payload).digest()) + payload)
            self.directory.chmod(0o700)
            make_room(self.directory, ".rows", self.disk_bytes)

    def _remember(self, key: str, rows_MD: Rows) -> None:
        self._memory[key] = rows_MD
        self._memory.move_to_end(key)
        while len(self._memory) > 1 and sum(r.nbytes for r in self._memory.values()) > self.memory_bytes:
            self._memory.popitem(last=False)

    def _read(self, key: str) -> Rows | None:
        if self.directory is None:
            return None
        path = self.directory / f"{key}.rows"
        try:
            with path.open("rb") as file:
                head = file.read(HEAD.size)
                payload = file.read(self.disk_bytes)
            os.utime(path)  # used now
        except OSError:
            return None
        if len(head) < HEAD.size:
            return None
        magic, M, D, digest = HEAD.unpack(head)
        if magic != MAGIC or len(payload) != 2 * M * D or hashlib.sha256(payload).digest() != digest:
            return None
        return np.frombuffer(payload, np.float16).reshape(M, D)
