"""Documents are decoded in a process of their own, which has SECONDS for each picture and MEMORY_BYTES in all.

A page can hold a drawing that takes hours, a video a stream that fills the memory, and neither library that reads them
can be interrupted or survives what breaks it. So a child process opens the file and sends finished pictures back, while
the parent watches clock and memory and ends it with one sentence. That costs about 0.2 s a file. It guards against
waste and crashes; it is no wall against code that takes the child over.

The child's standard input is the file, its argument says as JSON what is wanted. It writes lines of JSON: `next` names
what is decoded now, `size` is followed by that picture's RGB bytes, `error` is a sentence, `end` ends.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import psutil

from kimi_lite.errors import UsageError
from kimi_lite.images import Kind, Picture

SECONDS = 30.0  # for one page or frame, opening the file included
MEMORY_BYTES = 2 << 30
LOOK_S = 0.02  # between two looks at the child
NEEDS: dict[Kind, tuple[str, str]] = {  # the package to import, and why
    "pdf": ("pypdfium2", "reading a PDF needs pypdfium2"),
    "video": ("av", "reading a video needs PyAV"),
    "heic": ("pillow_heif", "reading a HEIC picture needs pillow-heif"),
}


def decoded(kind: Kind, source: Path | bytes, name: str, selection: tuple[str, str] | None) -> list[Picture]:
    """Pages of a PDF or frames of a video, chosen as kimi_lite/documents.py says, or the picture of a HEIC file.

    Raises:
        UsageError: what cannot be read or chosen, a picture that takes too long or too much memory, a missing extra.
    """
    from PIL import Image

    package, needs = NEEDS[kind]
    if find_spec(package) is None:
        raise UsageError(f"{name}: {needs}; pip install 'kimi-lite[{kind}]'")
    request = {"kind": kind, "name": name, "selection": selection, "seconds": SECONDS}
    if isinstance(source, Path):
        request["path"] = str(source)
    out: list[Picture] = []
    at = name
    told: dict[str, Any] = {}
    data = b"" if isinstance(source, Path) else source
    with _child(request, data) as (child, pipe), _Watch(child) as watch:
        for line in pipe:
            told = json.loads(line) if line.endswith(b"\n") else {}  # cut off where the child was ended
            if "next" in told:
                at = told["next"]
            elif "size" in told:
                width, height = told["size"]
                pixels = pipe.read(3 * width * height)
                if len(pixels) < 3 * width * height:
                    break
                out.append(Picture(at, Image.frombytes("RGB", (width, height), pixels)))
                watch.renew()
            else:
                break
        else:
            told = {}
        if "end" in told:
            return out
        if "error" in told:
            raise UsageError(told["error"])
        child.kill()
        code = child.wait()
    if watch.excess:
        raise UsageError(
            f"{at}: takes more than {watch.excess} to decode; leave it out, or give it as JPEG or PNG"
        )
    raise UsageError(
        f"{at}: its decoder broke off (code {code}); the file is damaged, save or download it again"
    )


@contextmanager
def _child(request: dict[str, Any], data: bytes) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process that works on a request, and its output; gone when the context ends."""
    # A file and not a pipe: a child that stops reading must not stop us.
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        command = [sys.executable, "-P", "-m", "kimi_lite.isolated", json.dumps(request)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert child.stdout is not None
        with child.stdout as pipe:
            try:
                yield child, pipe
            finally:
                child.kill()
                child.wait()


class _Watch(threading.Thread):
    """Ends the child when one picture takes too long or all of it too much memory; `excess` says of what."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__()
        self.child, self.excess = child, ""
        self.over = threading.Event()
        self.renew()

    def __enter__(self) -> "_Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def renew(self) -> None:
        self.deadline = time.monotonic() + SECONDS

    def run(self) -> None:
        try:
            process = psutil.Process(self.child.pid)
            while not self.over.wait(LOOK_S):
                if time.monotonic() > self.deadline:
                    self.excess = f"{SECONDS:g} seconds"
                elif process.memory_info().rss > MEMORY_BYTES:
                    self.excess = f"{MEMORY_BYTES / 2**30:.3g} GB of memory"
                if self.excess:
                    self.child.kill()
                    return
        except psutil.Error:  # it has just ended
            return


def serve(request: dict[str, Any], data: bytes, out: IO[bytes]) -> None:
    """The child's side: decode what is asked for and write it."""
    from kimi_lite.documents import heic_picture, pdf_pages, video_frames

    def say(**told: object) -> None:
        out.write(json.dumps(told).encode() + b"\n")

    def on_next(name: str) -> None:
        say(next=name)
        out.flush()
        if hasattr(signal, "alarm"):  # should the parent be gone, the system ends us
            signal.alarm(int(request["seconds"]) + 10)

    on_next(request["name"])
    selection = tuple(request["selection"]) if request["selection"] else None
    try:
        if request["kind"] == "pdf":
            pictures = pdf_pages(data, request["name"], selection, on_next)
        elif request["kind"] == "heic":
            pictures = heic_picture(data, request["name"])
        else:
            source = Path(request["path"]) if "path" in request else io.BytesIO(data)
            pictures = video_frames(source, request["name"], selection, on_next)
        for picture in pictures:
            say(size=picture.image.size)
            out.write(picture.image.tobytes())
        say(end=True)
    except UsageError as error:
        say(error=str(error))
    except MemoryError:
        say(error=f"{request['name']}: does not fit into memory; shrink it first")
    out.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as own:
        os.dup2(2, 1)  # whatever a library prints
        serve(json.loads(sys.argv[1]), sys.stdin.buffer.read(), own)
