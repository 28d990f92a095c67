"""What an int4 or int3 file is rounded for: text and pictures of the user's own, as the passages that `quantize` runs.

A text is cut into pieces of some 700 tokens; each is a conversation whose question is the piece's first quarter and whose
answer is the rest, so that the template's own tokens are among what the model sees. A picture is a question about it.
Of more than MAX_TEXTS pieces or MAX_IMAGES pictures, evenly spaced ones are taken: together they are some 60,000 tokens,
so that an expert sees more of them than its matrices have columns.
"""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kimi_lite.errors import KimiLiteWarning, UsageError
from kimi_lite.images import begins_like_one, load_pictures
from kimi_lite.quantize.calibrate import Passage
from kimi_lite.quantize.convert import write_image_side
from kimi_lite.quantize.plan import Checkpoint
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.template import Message, render
from kimi_lite.runtime.tokenizer import Tokenizer
from kimi_lite.runtime.vision import EncodedImage, ImageEncoder

if TYPE_CHECKING:
    from PIL import Image

PIECE = 2800  # characters
MAX_TEXTS, MAX_IMAGES, MAX_FILES = 56, 24, 1000
MAX_BYTES = 256 << 10  # of one text file: more than all pieces together
MAX_IMAGE_TOKENS = 1024  # of one picture
QUESTION = "What is in this picture?"
T = TypeVar("T")


def passages(checkpoint_dir: Path, sources: Sequence[str], scratch: Path) -> list[Passage]:
    """Text files, pictures (PDF pages and video frames too) and folders of them, as passages of the checkpoint's tokens.

    Args:
        scratch: a directory with room for the image side while pictures are encoded, half a gigabyte at full size.

    Raises:
        UsageError: a file that is neither text nor a picture, or nothing to read in all of them.
        ModelFileError: the checkpoint is incomplete or damaged, or has no image side and there are pictures.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint.vocab)
    texts, pictures, left_out = _sorted_out(sources)
    out = []
    for text in _spread(texts, MAX_TEXTS):
        asked = len(text) // 4
        ids = render([Message("user", text[:asked])], tokenizer) + tokenizer.encode(text[asked:])
        out.append(Passage([*ids, tokenizer.special("<|im_end|>")]))
    if pictures:
        width = checkpoint.config.text.hidden_size
        images = islice(_opened(_spread(pictures, MAX_IMAGES), frozenset(sources), left_out), MAX_IMAGES)
        for picture in _encoded(checkpoint_dir, images, width, scratch):
            ids = render([Message("user", (picture, QUESTION))], tokenizer)
            out.append(Passage(ids, picture.rows_MD.astype(np.float32)))
    if left_out:
        warnings.warn(
            f"--calibrate: left out {len(left_out)} files that are neither text nor pictures, such as {left_out[0]}",
            KimiLiteWarning,
            stacklevel=2,
        )
    if not out:
        raise UsageError(f"--calibrate {sources[0]}: no text and no picture in it")
    return out


def _sorted_out(sources: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """All pieces of text, the files that begin like pictures or were named one by one, and those in folders that do neither."""
    texts: list[str] = []
    pictures: list[str] = []
    left_out: list[str] = []
    for source in sources:
        folder = Path(source)
        if folder.is_dir():
            inside = (p for p in folder.rglob("*") if p.is_file())
            shown = [
                p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)
            ]
            files = [str(p) for p in _spread(sorted(shown), MAX_FILES)]
        else:
            files = [source]
        for file in files:
            data = _beginning(file)
            text = _text(data)
            if text is not None:
                pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
                texts += [piece for piece in pieces if piece.strip()]
            elif file == source or begins_like_one(data):
                pictures.append(file)
            else:
                left_out.append(file)
    return texts, pictures, left_out


def _beginning(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(MAX_BYTES)
    except FileNotFoundError:
        if "#" in file:  # pages of a PDF, frames of a video: what opens pictures knows
            return b"\0"
        raise UsageError(
            f"--calibrate {file}: not found; give a text file, a picture, or a folder of them"
        ) from None
    except OSError as error:
        raise UsageError(f"--calibrate {file}: cannot be read ({error.strerror})") from None


def _text(data: bytes) -> str | None:
    """What a file says, or None if that is no text."""
    if data.startswith(b"%PDF-") or b"\0" in data:  # a PDF may be all ASCII, and is pages
        return None
    try:
        # The last character may have been cut through.
        return data.decode("utf-8", "ignore" if len(data) == MAX_BYTES else "strict")
    except UnicodeDecodeError:
        return None


def _opened(files: list[str], named: frozenset[str], left_out: list[str]) -> "Iterator[Image.Image]":
    """Pictures one by one. A file that is none after all is an error if it was named, and left out if it lay in a folder."""
    for file in files:
        try:
            loaded = load_pictures([file], offline=True)
        except UsageError as error:
            if file in named:
                raise UsageError(f"--calibrate {error}") from None
            left_out.append(file)
            continue
        for picture in loaded:
            yield picture.image


def _encoded(
    checkpoint_dir: Path, images: "Iterator[Image.Image]", width: int, scratch: Path
) -> Iterator[EncodedImage]:
    """The pictures as the text model takes them; the image side is written for that, and gone afterwards."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".image-side-") as folder:
        side = Path(folder) / "mmproj.gguf"
        write_image_side(checkpoint_dir, side)
        yield from ImageEncoder(side, width, ImageCache(None), MAX_IMAGE_TOKENS).encode(images)


def _spread(items: Sequence[T], most: int) -> list[T]:
    """All items, or as many as that, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
