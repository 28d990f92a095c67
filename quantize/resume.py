"""What a calibration leaves behind when it is stopped, so that the same command goes on with it.

Calibrating the whole model takes the better part of an hour, and a laptop is closed before. So its file grows under a
name of its own, `model.gguf.calibrating`, and at the end of a layer, every minute at most, the sample's residual stream is
put beside it, `model.gguf.calibrating.state`: with the tensors before it, that is all that the next layer depends on. A run that is
stopped in whatever way, by Ctrl-C, a full disk or an empty battery, loses the layer that it was at.

The state carries a digest of everything that the finished tensors came from: the file's head, the sample, the
checkpoint's files as they are on the disk, and this version; and one of itself. Another digest, or a damaged file, and all
begins anew.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from kimi_lite import __version__
from kimi_lite.errors import DoesNotFitError, KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import GgufWriter
from kimi_lite.quantize.calibrate import Calibration

try:
    import fcntl
except ImportError:  # Windows, where a file that is held cannot get its name
    fcntl = None  # type: ignore[assignment]

EVERY = 60.0  # seconds: a state of 33,000 tokens has 270 MB
BEGINNING = ".attn_norm.weight"  # the first tensor of a layer


def part_of(out: Path) -> Path:
    """What a file is called until it is whole."""
    return out.with_name(f"{out.name}.calibrating")


class Journal:
    """The state of one calibration on the disk.

    Args:
        out: the file that is being written.
        origin: whatever its bytes come from besides the sample, such as its head and the checkpoint's files.
    """

    def __init__(self, out: Path, origin: Sequence[bytes | Path], calibration: Calibration) -> None:
        self.part = part_of(out)
        self.state = out.with_name(f"{out.name}.calibrating.state")
        self._new = out.with_name(f"{out.name}.calibrating.new")
        self._calibration, self._digest = calibration, _digest([*origin, *calibration.sample()])
        self._saved = time.monotonic()
        self._held = self._claim()
        self.start = self._found() if self.state.exists() else 0  # the number of tensors that are there

    def _claim(self) -> IO[bytes] | None:
        """Hold the part, so that no second run writes into it."""
        if fcntl is None:
            return None
        try:
            file = self.part.open("ab")
        except OSError as error:
            raise ModelFileError(f"{self.part}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(
                f"{self.part}: another run is writing it; wait for that one, or give another name"
            ) from None
        return file

    def _found(self) -> int:
        """Take up the state of a stopped run, if it is this one's."""
        try:
            with self.state.open("rb") as file:
                digest, check, head = (file.read(32) for _ in range(3))
                x_TD = np.fromfile(file, np.float32)
            start, n_bytes, T, D = map(int, np.frombuffer(head, np.int64))
            if check != _digest([head, x_TD]) or self.part.stat().st_size < n_bytes:
                raise ValueError
        except (OSError, ValueError):
            why = "is damaged or incomplete"
        else:
            if digest == self._digest:
                self._calibration.x_TD = x_TD.reshape(T, D)
                return start
            why = "came from another checkpoint, sample or version"
        warnings.warn(f"{self.state} {why}; calibrating begins anew", KimiLiteWarning, stacklevel=2)
        self.state.unlink()
        return 0

    def note(self, writer: GgufWriter) -> None:
        """Remember where the writer is, if a layer begins there and the last time is long ago."""
        if time.monotonic() - self._saved < EVERY or not (writer.due or "").endswith(BEGINNING):
            return
        x_TD = self._calibration.x_TD
        head = np.array([*writer.sync(), *x_TD.shape], np.int64).tobytes()
        try:
            with self._new.open("wb") as file:
                file.write(self._digest + _digest([head, x_TD]) + head)
                x_TD.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self.state)
        except OSError as error:
            raise DoesNotFitError(f"{self._new}: cannot be written ({error.strerror or error})") from None
        self._saved = time.monotonic()

    def stopped(self) -> None:
        """Say how to go on; where there is nothing to go on with, leave nothing."""
        if not self.state.exists():
            self.forget()
            return
        self._let_go()
        self._new.unlink(missing_ok=True)
        warnings.warn(
            f"stopped; the same command goes on from there. To give up, delete {self.part} and {self.state}",
            KimiLiteWarning,
            stacklevel=2,
        )

    def forget(self) -> None:
        """Remove the state, and the part if it has not become the file."""
        self._let_go()
        for path in (self.part, self.state, self._new):
            path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        if self._held:
            self._held.close()


def _digest(origin: Sequence[bytes | Path | NDArray[np.generic]]) -> bytes:
    found = hashlib.sha256(__version__.encode())
    for item in origin:
        if isinstance(item, Path):
            status = item.stat()
            found.update(f"{item.name} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            found.update(item if isinstance(item, bytes) else np.ascontiguousarray(item).data)
    return found.digest()
