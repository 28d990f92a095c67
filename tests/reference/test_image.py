"""The image processor against the published sizes and pixel facts, and PIL's bicubic written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import ImageConfig
from kimi_lite.runtime.reference.image import process, resized

SMALL, LARGE = ImageConfig(token_limit=4096), ImageConfig(token_limit=16384)


@pytest.mark.parametrize(
    ("size", "config", "grid"),
    [
        ((1, 1), SMALL, (2, 2)),
        ((13, 13), SMALL, (2, 2)),
        ((28, 28), SMALL, (2, 2)),
        ((30, 50), SMALL, (4, 4)),
        ((640, 480), SMALL, (36, 46)),
        ((1000, 1000), SMALL, (66, 66)),
        ((1000, 1000), LARGE, (72, 72)),
        ((1920, 1080), SMALL, (48, 86)),
        ((1920, 1080), LARGE, (78, 138)),
        ((4000, 3000), SMALL, (56, 74)),
        ((4000, 3000), LARGE, (112, 150)),
        ((10000, 200), SMALL, (10, 458)),
        ((7140, 64), SMALL, (6, 510)),
        ((897, 897), SMALL, (66, 66)),
        ((910, 910), SMALL, (64, 64)),
        ((1792, 1792), LARGE, (128, 128)),
        ((3840, 2160), LARGE, (98, 172)),
    ],
)
def test_the_published_sizes(size: tuple[int, int], config: ImageConfig, grid: tuple[int, int]) -> None:
    patches, found = process(Image.new("RGB", size), config)
    assert found == grid
    assert patches.shape == (grid[0] * grid[1], 588)


@pytest.mark.parametrize(
    ("size", "config"),
    [((10000, 200), LARGE), ((7168, 64), SMALL), ((7141, 64), SMALL), ((20000, 10), SMALL)],
)
def test_a_side_beyond_the_position_table_is_one_sentence(size: tuple[int, int], config: ImageConfig) -> None:
    with pytest.raises(UsageError, match="at most 510"):
        process(Image.new("RGB", size), config)


def test_padding_is_black_before_normalising_at_the_right_and_the_bottom() -> None:
    patches, (h, w) = process(Image.new("RGB", (30, 50), "white"), SMALL)
    canvas = patches.reshape(h, w, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, h * 14, w * 14)
    assert (canvas[:, :50, :30] == 1).all()
    assert (canvas[:, 50:] == -1).all()
    assert (canvas[:, :, 30:] == -1).all()


def test_patches_run_in_raster_order_channel_first() -> None:
    pixels = np.zeros((28, 56, 3), np.uint8)
    pixels[0, 14] = (255, 0, 0)  # the right neighbour of patch 0
    pixels[14, 0] = (0, 255, 0)  # the one below: patch w
    patches, (_, w) = process(Image.fromarray(pixels), SMALL)
    assert patches[1].reshape(3, 14, 14)[0, 0, 0] == 1
    assert patches[w].reshape(3, 14, 14)[1, 0, 0] == 1
    assert (patches == 1).sum() == 2


def test_pixels_follow_the_published_float32_steps() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    patches, _ = process(Image.fromarray(pixels), SMALL)
    row = patches.reshape(2, -1, 3, 14, 14)[0, :, 0, 0].reshape(-1)[:256]
    u = np.arange(256, dtype=np.float32)
    assert np.array_equal(row, (u / np.float32(255) - np.float32(0.5)) / np.float32(0.5))


def test_a_picture_below_the_limit_is_not_resampled() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (476, 644, 3), dtype=np.uint8)
    patches, (h, w) = process(Image.fromarray(pixels), SMALL)
    canvas = patches.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)
    assert np.array_equal(np.rint((canvas[:476] + 1) * 127.5), pixels)


def bicubic(pixels: NDArray[np.uint8], n_out: int) -> NDArray[np.uint8]:
    """PIL's antialiased bicubic along the first axis: a = -0.5, weights in 22-bit fixed point."""
    n, a = len(pixels), -0.5
    ratio = n / n_out
    stretch = max(ratio, 1.0)
    out = np.empty((n_out, *pixels.shape[1:]), np.uint8)
    for d in range(n_out):
        centre = (d + 0.5) * ratio
        low, high = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), n)
        weights = []
        for j in range(low, high):
            x = abs((j + 0.5 - centre) / stretch)
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            weights.append(near if x < 1 else (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0)
        fixed = [int(v / sum(weights) * 2**22 + math.copysign(0.5, v)) for v in weights]
        total = sum(k * pixels[j].astype(np.int64) for j, k in zip(range(low, high), fixed, strict=True))
        out[d] = np.clip((total + 2**21) >> 22, 0, 255)
    return out


def test_shrinking_is_pils_bicubic_bit_for_bit() -> None:
    config = ImageConfig(token_limit=16)
    pixels = np.random.default_rng(1).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    size = resized((140, 100), 16)
    assert size == (66, 47)
    expected = bicubic(bicubic(pixels.transpose(1, 0, 2), size[0]).transpose(1, 0, 2), size[1])
    patches, (h, w) = process(Image.fromarray(pixels), config)
    canvas = patches.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)
    assert np.array_equal(np.rint((canvas[: size[1], : size[0]] + 1) * 127.5), expected)
