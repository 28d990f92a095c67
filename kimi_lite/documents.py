"""Pages of a PDF, frames of a video and photographs in HEIC, as pictures. Each needs an extra: kimi-lite[pdf],
kimi-lite[video], kimi-lite[heic].

    report.pdf                  all pages, if there are at most MAX_PAGES
    report.pdf#pages=1,3-5      these pages, counted from 1
    clip.mp4                    FRAMES frames, evenly spread
    clip.mp4#frames=12          so many, evenly spread
    clip.mp4#times=0.5,12       the frames shown at these seconds

The model has no notion of time: frames are pictures in order, as its makers recommend. How many, and where, is our own
choice. What is here runs in a process of its own (kimi_lite/isolated.py); `on_next` is told the name of each picture
before it is decoded.
"""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kimi_lite.errors import UsageError
from kimi_lite.images import MAX_PICTURES, MAX_PIXELS, Picture, to_rgb

MAX_PAGES = 16
FRAMES = 8
SCALE = 2.0  # pixels a point: 144 a inch, at which small print is legible
PAGE_PIXELS = 8_000_000  # of a rendered page; a larger sheet gets fewer pixels an inch
SEARCH = 900  # frames decoded between the nearest key frame and the one that is asked for
FRAME_PIXELS = 100_000_000
OnNext = Callable[[str], None]


def pdf_pages(
    data: bytes, name: str, selection: tuple[str, str] | None, on_next: OnNext
) -> Iterator[Picture]:
    """Rendered pages. Raises UsageError: a password, damage, a page that does not exist."""
    import pypdfium2

    if selection and selection[0] != "pages":
        raise UsageError(
            f"{name}: #{selection[0]}= selects frames of a video, but this is a PDF; use #pages="
        )
    try:
        document = pypdfium2.PdfDocument(data)
        n = len(document)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise UsageError(f"{name}: protected by a password; save a copy without one") from None
        raise UsageError(f"{name}: a damaged PDF ({error}); download or save it again") from None
    try:
        if selection:
            numbers = _numbers(selection[1], n, name)
        elif 1 <= n <= MAX_PAGES:
            numbers = list(range(1, n + 1))
        elif n:
            raise UsageError(
                f"{name}: {n} pages; choose up to {MAX_PICTURES}, such as {name}#pages=1-{MAX_PAGES}"
            )
        else:
            raise UsageError(f"{name}: a PDF without pages")
        for number in numbers:
            on_next(page := f"{name} page {number}")
            yield Picture(page, _page(document, number, name))
    finally:
        document.close()


def _page(document: Any, number: int, name: str) -> Any:
    import pypdfium2

    try:
        page = document[number - 1]
        width, height = page.get_size()
        if not (width >= 1 and height >= 1 and math.isfinite(width * height)):
            raise UsageError(f"{name}: page {number} is {width:g}×{height:g} points; nothing can be shown")
        scale = min(SCALE, math.sqrt(PAGE_PIXELS / (width * height)))
        return page.render(scale=scale).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        raise UsageError(f"{name}: page {number} cannot be shown ({error})") from None


def _numbers(text: str, n: int, name: str) -> list[int]:
    """Page numbers of "1,3-5"."""
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise UsageError(f"{name}: #pages={text} is not a list of pages; write it as 1,3-5") from None
        if not 1 <= low <= high <= n:
            raise UsageError(f"{name}: there is no page {part.strip()}; the PDF has {n}")
        if len(out) + high - low + 1 > MAX_PICTURES:
            raise UsageError(f"{name}: #pages={text} is more than {MAX_PICTURES} pages; ask in parts")
        out += range(low, high + 1)
    return out


def video_frames(
    source: Path | io.BytesIO, name: str, selection: tuple[str, str] | None, on_next: OnNext
) -> Iterator[Picture]:
    """Frames of a video. Raises UsageError: no pictures inside, damage, times beyond its end."""
    import av

    if selection and selection[0] == "pages":
        raise UsageError(f"{name}: #pages= selects in a PDF, but this is a video; use #frames= or #times=")
    try:
        with av.open(str(source) if isinstance(source, Path) else source) as container:
            if not container.streams.video:
                raise UsageError(f"{name}: no moving picture inside")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > FRAME_PIXELS:
                raise UsageError(f"{name}: its frames are too large; shrink it first")
            duration = _duration(container, stream)
            for t in _times(selection, duration, name):
                on_next(moment := f"{name} at {t:.1f} s")
                yield Picture(moment, _frame(container, stream, t, name))
    except (av.FFmpegError, MemoryError) as error:
        raise UsageError(f"{name}: a damaged video ({error}); save or download it again") from None


def _duration(container: Any, stream: Any) -> float:
    """Seconds; 0 where the file does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(container.duration / 1_000_000) if container.duration else 0.0


def _times(selection: tuple[str, str] | None, duration: float, name: str) -> list[float]:
    what, which = selection or ("frames", str(FRAMES))
    try:
        if what == "times":
            times = [float(part) for part in which.split(",")]
            if any(not 0 <= t < max(duration, 1e-9) for t in times):
                raise UsageError(
                    f"{name}: #times={which} lies outside the video, which lasts {duration:.1f} seconds"
                )
        else:
            n = int(which)
            if n < 1:
                raise ValueError
            # The middle of n equal parts; a file that does not tell its length gives its first frame.
            times = [(i + 0.5) * duration / n for i in range(n)] if duration > 0 else [0.0]
    except ValueError:
        raise UsageError(
            f"{name}: #{what}={which} is not understood; write #frames=8 or #times=1.5,20"
        ) from None
    if len(times) > MAX_PICTURES:
        raise UsageError(
            f"{name}: {len(times)} frames are asked for; at most {MAX_PICTURES} fit one question"
        )
    return times


def _frame(container: Any, stream: Any, seconds: float, name: str) -> Any:
    """The frame on the screen at a time: the last one that begins no later."""
    container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
    begin = float((stream.start_time or 0) * stream.time_base)
    shown = None
    for i, frame in enumerate(container.decode(stream)):
        if shown is not None and (frame.time is None or frame.time - begin > seconds + 1e-6):
            break
        shown = frame
        if i >= SEARCH:
            raise UsageError(
                f"{name}: no key frame within {SEARCH} frames of {seconds:.1f} s; convert it first"
            )
    if shown is None:
        raise UsageError(f"{name}: no frame at {seconds:.1f} s; the video is damaged or cut short")
    return shown.to_image().convert("RGB")


def heic_picture(data: bytes, name: str) -> Iterator[Picture]:
    """The main picture of a HEIC file, turned and mirrored as the file says. Raises UsageError for damage."""
    import pillow_heif

    try:
        file = pillow_heif.open_heif(io.BytesIO(data))  # the header alone; wider channels are cut to 8 bits
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise UsageError(
                f"{name}: {width}×{height} pixels, more than {MAX_PIXELS // 1_000_000} million; shrink it first"
            )
        yield Picture(name, to_rgb(file.to_pillow(), name))
    except (ValueError, OSError, EOFError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{name}: a damaged HEIC picture ({reason}); save it again, or as JPEG or PNG"
        ) from None
