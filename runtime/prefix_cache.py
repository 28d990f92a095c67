"""What the latent cache held behind a picture, on disk, so that a second question about it reads nothing again, even in a new process.

A picture of a thousand tokens costs two cores some eight seconds of prefill. Its latents depend on the model and on the tokens in
front of it, which in a question about a picture is the template alone. So they are kept, picture by picture: a *span* begins where the last
picture ended and ends with this one, and its key is a digest of the model's file, of this module's version, and of all tokens and
pictures up to its end. What follows the last picture, the question itself, is not kept.

An entry is one file in the private directory of encoded pictures (0700, files 0600), about 16.5 kB a token at full size:

    b"KLPREFX1" · first and end position, two little-endian u32 · SHA-256 of the rows · the rows of each layer

These are row blocks of 16 positions as they lie in the cache; its columns are made from them. A file that is short, altered
or unreadable counts as absent. Beyond DISK_BYTES those that were used least recently go. KIMI_LITE_IMAGE_CACHE is another
directory, or `off`.
"""

import contextlib
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.directories import make_room, written
from kimi_lite.runtime.vision import Place

MAGIC = b"KLPREFX1"
HEAD = struct.Struct("<8sII32s")
RESULT_VERSION = 2  # of the latents' bits and of how they lie; a new one never reads an old one's entries
DISK_BYTES = 1 << 30
SAMPLES, SAMPLE_BYTES = 256, 4096  # of a model's file, evenly spaced, tell it from another


@dataclass(frozen=True, slots=True)
class Span:
    """Positions first..end of a prompt, which end with a picture."""

    first: int
    end: int
    key: str


class PrefixCache:
    """Of one model. Trouble with the disk never reaches the caller: it costs a prefill."""

    def __init__(self, model: mmap.mmap, directory: Path | None, disk_bytes: int = DISK_BYTES) -> None:
        """`model` is its file, mapped: what is mapped can be read even after somebody has moved the file away."""
        self._model, self._directory, self._disk_bytes = model, directory, disk_bytes
        self._identity = b""

    def spans(self, tokens: Sequence[int], places: Sequence[Place]) -> Iterator[Span]:
        """One for each picture that is there to its last token, in order."""
        if self._directory is None or not any(places):
            return
        digest = hashlib.sha256(b"%d" % RESULT_VERSION + self._model_identity())
        first = 0
        for i, place in enumerate(places):
            if place is not None and place[1] == place[0].n_tokens - 1:
                digest.update(np.asarray(tokens[first : i + 1], "<i4").tobytes() + place[0].digest.encode())
                yield Span(first, i + 1, digest.copy().hexdigest())
                first = i + 1

    def restore(self, span: Span, cache: LatentCache) -> bool:
        """Fill the span's positions, if there is an entry; all in front of it are filled."""
        path, layers = self._path(span), cache.rows(span.first, span.end)
        try:
            with path.open("rb") as file:
                head = file.read(HEAD.size)
                body = np.frombuffer(file.read(self._disk_bytes), np.uint8)
            os.utime(path)  # used now
        except OSError:
            return False
        # All of it is judged before any of it reaches the cache, whose positions so far must stay whatever the file holds.
        size = sum(rows.size for rows in layers)
        if body.size != size or head != HEAD.pack(
            MAGIC, span.first, span.end, hashlib.sha256(body.data).digest()
        ):
            return False
        for rows, part in zip(layers, np.split(body, len(layers)), strict=True):
            rows[:] = part
        cache.adopt(span.first, span.end)
        return True

    def keep(self, span: Span, cache: LatentCache) -> None:
        """Make an entry of what the cache holds, unless there is one."""
        path, layers = self._path(span), cache.rows(span.first, span.end)
        if path.exists() or sum(rows.size for rows in layers) > self._disk_bytes:
            return
        digest = hashlib.sha256()
        with contextlib.suppress(OSError):
            with written(path) as file:
                file.write(bytes(HEAD.size))
                for rows in layers:
                    digest.update(rows.data)
                    file.write(rows.data)
                file.seek(0)
                file.write(HEAD.pack(MAGIC, span.first, span.end, digest.digest()))
            path.parent.chmod(0o700)
            make_room(path.parent, path.suffix, self._disk_bytes)

    def _path(self, span: Span) -> Path:
        assert self._directory is not None
        return self._directory / f"{span.key}.latents"

    def _model_identity(self) -> bytes:
        if not self._identity:
            size = len(self._model)
            digest = hashlib.sha256(b"%d" % size)
            for place in np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLES, dtype=np.int64):
                digest.update(self._model[int(place) : int(place) + SAMPLE_BYTES])
            self._identity = digest.digest()
        return self._identity
