"""The image processor: a picture to normalised patches, as the published code does it.

Shrink only above the patch limit (PIL's antialiased bicubic, floors everywhere), pad right and bottom with black up to
multiples of 28 *before* normalising, cut into 14×14 patches in raster order. The result may exceed the limit, because
padding comes last. Grids are (rows, columns), PIL sizes (width, height).
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import ImageConfig

PATCH = 14
MAX_SIDE_PATCHES = 512  # sides of this many patches or more exceed the published position tables


def resized(size: tuple[int, int], token_limit: int) -> tuple[int, int]:
    """The (width, height) that a picture is shrunk to; unchanged below the limit."""
    width, height = size
    n = (width // PATCH) * (height // PATCH)
    if n <= token_limit:
        return size
    scale = math.sqrt(token_limit / n)
    return int(width * scale), int(height * scale)


def process(picture: Image.Image, config: ImageConfig) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Patches float32 [P, 3·14·14] (channel, row, column inside each) and the grid (rows, columns), both even.

    Raises:
        UsageError: a padded side of 512 patches (7168 px) or more.
    """
    size = resized(picture.size, config.token_limit)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    width, height = (-(-side // 28) * 28 for side in size)
    if max(width, height) // PATCH >= MAX_SIDE_PATCHES:
        raise UsageError(
            f"the picture is {picture.width}×{picture.height} pixels, {max(width, height) // PATCH} patches on its "
            f"longer side; the model takes at most {MAX_SIDE_PATCHES - 2}: shrink or crop it"
        )
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: size[1], : size[0]] = np.asarray(picture.convert("RGB"))
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    values: NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    h, w = height // PATCH, width // PATCH
    patches = values.reshape(h, PATCH, w, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(h * w, 3 * PATCH * PATCH), (h, w)
