"""The image processor: a picture to normalised patches, exactly as the published one computes them.

Shrink only above the patch limit (antialiased bicubic, floors everywhere), pad with black at the right and the bottom
up to multiples of 28 pixels, then normalise: padding is therefore -1, not 0. Patches of 14×14 pixels follow in raster
order, channel first. Padding comes after the limit, so a picture may exceed it: 1000×1000 pixels at a limit of 4096
become 4356 patches.

A token is 2×2 patches. `max_tokens` is our own addition: it lowers the patch limit until no more tokens come out.

Sizes are (width, height), grids (rows, columns).

Dimension key:  P patches   X = 3·14·14, the values of a patch
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import ImageConfig

if TYPE_CHECKING:
    from PIL import Image

PATCH = 14
TOKEN = 2 * PATCH  # pixels of a token's side
MAX_SIDE = 512  # sides of this many patches lie beyond the published position tables

Size = tuple[int, int]


def shrunk(size: Size, limit: int) -> Size:
    """The size that a picture is resized to; itself if it has at most `limit` whole patches."""
    width, height = size
    n = (width // PATCH) * (height // PATCH)
    if n <= limit:
        return size
    scale = math.sqrt(limit / n)
    return int(width * scale), int(height * scale)


def padded_grid(size: Size) -> tuple[int, int]:
    """Rows and columns of patches once a picture is padded to whole tokens."""
    width, height = size
    return -(-height // TOKEN) * 2, -(-width // TOKEN) * 2


def plan(size: Size, config: ImageConfig, max_tokens: int | None = None) -> tuple[Size, tuple[int, int]]:
    """The size to resize to, and the grid that comes out; nothing is decoded for it.

    Raises:
        UsageError: a side of 512 patches or more (7141 pixels), or a shape that `max_tokens` cannot hold.
    """
    limit = config.token_limit
    new = shrunk(size, limit)
    if max_tokens is not None:
        limit = min(limit, 4 * max_tokens)
        new = shrunk(size, limit)
        while _tokens(new) > max_tokens and limit > 1:
            limit -= max(1, limit // 64)
            new = shrunk(size, limit)
        if min(new) < 1 or _tokens(new) > max_tokens:
            raise UsageError(
                f"a picture of {size[0]}×{size[1]} pixels does not fit into {max_tokens} image tokens; allow more"
            )
    grid = padded_grid(new)
    if min(new) < 1:
        raise UsageError(f"a picture of {size[0]}×{size[1]} pixels is too narrow to be shrunk; crop it")
    if max(grid) >= MAX_SIDE:
        raise UsageError(
            f"a picture of {size[0]}×{size[1]} pixels has {max(grid)} patches on its longer side; the model takes at "
            f"most {MAX_SIDE - 2}: crop it, or shrink that side to {(MAX_SIDE - 2) * PATCH} pixels"
        )
    return new, grid


def is_canvas(size: Size, config: ImageConfig) -> bool:
    """Could a picture of this size be what `plan` and padding made of one? Padding may have taken it beyond the limit a little."""
    (rows, columns), side = padded_grid(size), 2 * PATCH
    whole = size[0] % side == 0 and size[1] % side == 0
    return whole and max(rows, columns) < MAX_SIDE and (rows - 2) * (columns - 2) <= 2 * config.token_limit


def _tokens(size: Size) -> int:
    rows, columns = padded_grid(size)
    return rows * columns // 4


def canvas(picture: "Image.Image", size: Size, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture resized and padded: uint8 [rows · 14, columns · 14, 3]. `picture` is RGB."""
    from PIL import Image  # only once there is a picture

    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    pixels = np.zeros((grid[0] * PATCH, grid[1] * PATCH, 3), np.uint8)
    pixels[: size[1], : size[0]] = np.asarray(picture)
    return pixels


def patches(pixels: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.float32]:
    """Normalised patches [P, X] of a canvas, in the published order of float32 steps."""
    h, w = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    # A byte has 256 values: each is normalised once, for each channel.
    byte = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = (byte - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
    cut = pixels.reshape(h, PATCH, w, PATCH, 3).transpose(4, 0, 2, 1, 3)  # channel, row, column, y, x
    values = np.empty((h, w, 3, PATCH, PATCH), np.float32)
    for channel in range(3):
        values[:, :, channel] = table[:, channel][cut[channel]]
    return values.reshape(h * w, 3 * PATCH * PATCH)
