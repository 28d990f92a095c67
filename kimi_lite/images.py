"""Pictures from wherever people have them, opened safely: one clear sentence for whatever cannot be shown.

    "photo.jpg", Path       a file; what counts is its content, not its name
    "https://…"             fetched with bounds on size and time, public addresses only (kimi_lite/fetch.py)
    "data:image/png;base64,…", bytes, "-" (standard input)
    a PIL picture
    "report.pdf#pages=2-4"  pages of a PDF, and "clip.mp4#frames=6" or "clip.mp4#times=1.5,20" frames of a video
                            (kimi_lite/documents.py, which reads HEIC too); one source may give several pictures

A picture comes out upright (EXIF rotation is applied), in 8-bit RGB; what is transparent lies on white; of an animation
the first frame counts. Sizes are read from the header before anything is decoded.
"""

import base64
import binascii
import io
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, unquote_to_bytes

from kimi_lite.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 100 << 20  # of a file, and of what comes through a pipe
MAX_PIXELS = 100_000_000  # 300 MB as RGB; larger than the sensors of nearly all cameras
MAX_PICTURES = 32  # of one question, PDF pages and video frames included
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
KINDS = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or HEIC"
AVIF = {b"avif", b"avis"}  # brands of the container that MP4 shares with pictures
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
Kind = Literal["pdf", "video", "heic"]
SELECTION = re.compile(r"(?P<path>.+)#(?P<what>pages|frames|times)=(?P<which>[^#]+)", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture and what to call it in a message."""

    name: str
    image: "Image.Image"


def load_pictures(sources: Sequence[object], *, offline: bool = False) -> list[Picture]:
    """Open pictures in order.

    Raises:
        UsageError: a source that is no picture, too large, unreachable, or would need an extra that is missing.
    """
    out: list[Picture] = []
    for source in sources:
        out += [source] if isinstance(source, Picture) else _load(source, offline)
    return out


def _load(source: object, offline: bool) -> list[Picture]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return from_bytes(bytes(source), "the picture")
    if isinstance(source, Path):
        return _from_path(source, None, str(source))
    if isinstance(source, str):
        return _from_text(source, offline)
    from PIL import Image

    if isinstance(source, Image.Image):
        return [Picture("the picture", to_rgb(source, "the picture"))]
    raise UsageError(
        f"a picture is given as {type(source).__name__}; expected a path, a URL, bytes or a PIL picture"
    )


def _from_text(source: str, offline: bool) -> list[Picture]:
    if source == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        return from_bytes(data, "standard input")
    if source[:5].lower() == "data:":
        return from_bytes(_data_uri(source), "the data URI")
    if re.match(r"https?://", source, re.IGNORECASE):
        if offline:
            raise UsageError(
                f"{source}: not fetched, because --offline is set; download it and give the file"
            )
        from kimi_lite.fetch import fetch

        selected = SELECTION.fullmatch(source)
        url = selected["path"] if selected else source
        return from_bytes(fetch(url), url, (selected["what"], selected["which"]) if selected else None)
    if source[:7].lower() == "file://":
        source = unquote(source[7:])
    path, selected = Path(source).expanduser(), SELECTION.fullmatch(source)
    if selected and not path.exists():
        return _from_path(
            Path(selected["path"]).expanduser(), (selected["what"], selected["which"]), selected["path"]
        )
    return _from_path(path, None, source)


def _from_path(path: Path, selection: tuple[str, str] | None, name: str) -> list[Picture]:
    try:
        if path.is_dir():
            raise UsageError(f"{name}: a directory; give a picture file inside it")
        if path.exists() and not path.is_file():
            raise UsageError(f"{name}: not a regular file; give a picture file")
        with path.open("rb") as file:
            head = file.read(4096)
            if _kind(head) == "video":  # may be large: it is read where it lies
                from kimi_lite.isolated import decoded

                return decoded("video", path, name, selection)
            data = head + file.read(MAX_BYTES + 1 - len(head))
    except FileNotFoundError:
        raise UsageError(f"{name}: not found; give the path of a picture") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return from_bytes(data, name, selection)


def from_bytes(data: bytes, name: str, selection: tuple[str, str] | None = None) -> list[Picture]:
    """The picture, pages or frames that a file's content holds. Raises UsageError."""
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name}: more than {MAX_BYTES >> 20} MB; make it smaller")
    kind = _kind(data[:4096])
    if selection and kind not in ("pdf", "video"):
        raise UsageError(f"{name}: #{selection[0]}= selects in PDFs and videos, but this is neither")
    if kind:
        from kimi_lite.isolated import decoded

        return decoded(kind, data, name, selection)
    return [Picture(name, _decode(data, name))]


def begins_like_one(head: bytes) -> bool:
    """Whether a file with these first bytes is worth opening as a picture, PDF or video; what it is shows then."""
    from PIL import Image

    Image.init()
    accepts = [Image.OPEN[f][1] for f in FORMATS if f in Image.OPEN]
    return _kind(head) is not None or any(accept is not None and accept(head[:16]) for accept in accepts)


def _kind(head: bytes) -> Kind | None:
    """What kimi_lite/isolated.py decodes: PDF; MP4, QuickTime, Matroska, WebM and AVI; HEIC. Else None."""
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if brands := _brands(head):
        return None if brands & AVIF else "heic" if brands & HEIC else "video"
    if head[:4] == b"\x1a\x45\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return "video"
    return None


def _brands(head: bytes) -> set[bytes]:
    """What an MP4-like container says it is, its main brand and those that it also keeps to."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4]), len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end, 4))}


def _decode(data: bytes, name: str) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UsageError(f"{name}: empty; expected a picture")
    start = data[:1024].lstrip().lower()
    if start.startswith(b"<svg") or (
        start.startswith((b"<?xml", b"<!doctype svg")) and b"<svg" in data[:65536].lower()
    ):
        raise UsageError(f"{name}: an SVG drawing, which has no pixels; convert it to PNG first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is checked here; odd metadata does not matter
        try:
            Image.init()
            readable = [f for f in FORMATS if f in Image.OPEN]  # AVIF depends on how Pillow was built
            if "AVIF" not in readable and _brands(data[:4096]) & AVIF:
                raise UsageError(
                    f"{name}: an AVIF picture, which this Pillow does not read; pip install -U 'pillow>=11.3'"
                )
            picture = Image.open(io.BytesIO(data), formats=readable)
        except UnidentifiedImageError:
            raise UsageError(
                f"{name}: not a picture that is read here (it begins with {data[:8]!r}); expected {KINDS}"
            ) from None
        except Image.DecompressionBombError:
            raise UsageError(
                f"{name}: more than {MAX_PIXELS // 1_000_000} million pixels; shrink it first"
            ) from None
        except Exception as error:
            raise UsageError(f"{name}: a damaged picture ({error}); save it again") from None
        width, height = picture.size
        if width < 1 or height < 1:
            raise UsageError(f"{name}: {width}×{height} pixels; a picture needs at least one")
        if width * height > MAX_PIXELS:
            raise UsageError(
                f"{name}: {width}×{height} pixels, more than {MAX_PIXELS // 1_000_000} million; shrink it first"
            )
        try:
            picture.load()
        except MemoryError:
            raise UsageError(
                f"{name}: {width}×{height} pixels do not fit into memory; shrink it first"
            ) from None
        except Exception as error:  # decoders raise whatever a damaged stream brings about
            raise UsageError(f"{name}: damaged or cut short ({error}); save or download it again") from None
        return to_rgb(picture, name)


def to_rgb(picture: "Image.Image", name: str) -> "Image.Image":
    """Upright 8-bit RGB: rotation applied, transparency on white, 16 bits a channel cut to their upper 8."""
    from PIL import Image, ImageOps

    if min(picture.size) < 1:
        raise UsageError(f"{name}: {picture.width}×{picture.height} pixels; a picture needs at least one")
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # unreadable EXIF data leaves the picture as it is stored
        picture = picture.copy()
    if picture.mode.startswith("I"):
        if picture.mode == "I":  # 32 bits that hold 16
            picture = picture.point(lambda v: v / 256.0).convert("L")
        else:
            import numpy as np

            picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise UsageError(f"{name}: floating-point pixels have no fixed white; convert it to 8 bits first")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise UsageError("the data URI has no comma; expected data:image/png;base64,…")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise UsageError(f"the data URI: more than {MAX_BYTES >> 20} MB; make it smaller")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote(body), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the data URI is not valid base64; expected data:image/png;base64,…") from None
