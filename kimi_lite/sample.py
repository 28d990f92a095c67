"""What an int4 file is rounded for: text and pictures of the user's own, as the passages that `quantize` runs.

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
from kimi_lite.images import load_pictures
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
MAX_BYTES = 4 << 20  # of one text file
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
    texts, pictures = _sorted_out(sources)
    out = []
    for text in _spread(texts, MAX_TEXTS):
        asked = len(text) // 4
        ids = render([Message("user", text[:asked])], tokenizer) + tokenizer.encode(text[asked:])
        out.append(Passage([*ids, tokenizer.special("<|im_end|>")]))
    if pictures:
        width = checkpoint.config.text.hidden_size
        chosen = _spread(pictures, MAX_IMAGES)
        for picture in _encoded(checkpoint_dir, chosen, frozenset(sources), width, scratch):
            ids = render([Message("user", (picture, QUESTION))], tokenizer)
            out.append(Passage(ids, picture.rows_MD.astype(np.float32)))
    if not out:
        raise UsageError(f"--calibrate {sources[0]}: no text and no picture in it")
    return out


def _sorted_out(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """All pieces of text, and the files that are not text."""
    texts: list[str] = []
    pictures: list[str] = []
    for source in sources:
        files = [source]
        if Path(source).is_dir():
            inside = sorted(p for p in Path(source).rglob("*") if p.is_file() and not p.name.startswith("."))
            files = [str(p) for p in _spread(inside, MAX_FILES)]
        for file in files:
            text = _text(file)
            if text is None:
                pictures.append(file)
            else:
                pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
                texts += [piece for piece in pieces if piece.strip()]
    return texts, pictures


def _text(file: str) -> str | None:
    """What a file says, or None if that is no text."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_BYTES)
    except FileNotFoundError:
        if "#" in file:  # pages of a PDF, frames of a video
            return None
        raise UsageError(
            f"--calibrate {file}: not found; give a text file, a picture, or a folder of them"
        ) from None
    except OSError as error:
        raise UsageError(f"--calibrate {file}: cannot be read ({error.strerror})") from None
    if data.startswith(b"%PDF-"):  # which may be all ASCII, and is pages
        return None
    try:
        # The last character may have been cut through.
        text = data.decode("utf-8", "ignore" if len(data) == MAX_BYTES else "strict")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _encoded(
    checkpoint_dir: Path, files: list[str], named: frozenset[str], width: int, scratch: Path
) -> Iterator[EncodedImage]:
    """The pictures as the text model takes them; the image side is written for that, and gone afterwards. A file that is
    no picture is an error if it was named, and left out if it only lay in a folder."""
    failed: list[str] = []

    def opened() -> "Iterator[Image.Image]":
        for file in files:
            try:
                for picture in load_pictures([file], offline=True):
                    yield picture.image
            except UsageError as error:
                if file in named:
                    raise UsageError(f"--calibrate {error}") from None
                failed.append(str(error))

    with tempfile.TemporaryDirectory(dir=scratch, prefix=".image-side-") as folder:
        side = Path(folder) / "mmproj.gguf"
        write_image_side(checkpoint_dir, side)
        encoder = ImageEncoder(side, width, ImageCache(None), MAX_IMAGE_TOKENS)
        yield from encoder.encode(islice(opened(), MAX_IMAGES))
    if failed:
        warnings.warn(
            f"--calibrate: left out {len(failed)} files that are neither text nor pictures: {failed[0]}",
            KimiLiteWarning,
            stacklevel=2,
        )


def _spread(items: Sequence[T], most: int) -> list[T]:
    """All items, or as many as that, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
