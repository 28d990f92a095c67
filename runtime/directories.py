"""Where the runtime keeps what it may lose: pictures as they were encoded and read, experts' use, compiled kernels."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_directory(name: str, variable: str) -> Path | None:
    """The user's cache directory for `name`; another one, or none for "off", if the environment variable says so."""
    named = os.environ.get(variable)
    if named == "off":
        return None
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("kimi-lite") / name


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A private file (0600) that takes its name when it is complete, so that no reader meets half of it.

    One that is left behind by a process that was killed has the suffix of a complete one, for `make_room`. Raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(path.suffix, "writing-", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def make_room(directory: Path, suffix: str, most_bytes: int) -> None:
    """Delete the files of that suffix that were used least recently, until the others take no more than `most_bytes`."""
    found = []
    for path in directory.glob(f"*{suffix}"):
        with contextlib.suppress(OSError):  # another process was faster
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
