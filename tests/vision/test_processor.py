"""The runtime's image processor gives the reference's pixel values bit for bit, at every size and in every mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import ImageConfig
from kimi_lite.images import to_rgb
from kimi_lite.runtime import image
from kimi_lite.runtime.reference.image import process


def same_as_reference(picture: Image.Image, config: ImageConfig) -> None:
    try:
        expected, grid = process(picture, config)
    except UsageError as error:
        with pytest.raises(UsageError, match="at most 510"):
            image.plan(picture.size, config)
        assert "at most 510" in str(error)  # noqa: PT017
        return
    size, found_grid = image.plan(picture.size, config)
    assert found_grid == grid
    found = image.patches(image.canvas(picture, size, grid), config)
    assert found.dtype == expected.dtype == np.float32
    assert np.array_equal(found, expected)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 100_003 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([64, 1024, 4096]))
def test_any_size(width: int, height: int, limit: int) -> None:
    same_as_reference(picture(width, height), ImageConfig(token_limit=limit))


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        ((1, 1), 4096),
        ((1, 7140), 4096),  # strips of one pixel
        ((7140, 1), 4096),
        ((1, 7141), 4096),  # beyond the position table
        ((20000, 10), 4096),
        ((10000, 200), 4096),
        ((10000, 200), 16384),
        ((7138, 167), 4096),
        ((1920, 1080), 4096),
        ((1920, 1080), 16384),
        ((1792, 1792), 16384),
        ((897, 897), 4096),
        ((910, 910), 4096),
    ],
)
def test_published_and_odd_sizes(size: tuple[int, int], limit: int) -> None:
    same_as_reference(picture(*size), ImageConfig(token_limit=limit))


def test_other_constants() -> None:
    config = ImageConfig(token_limit=100, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.268, 0.261, 0.275))
    same_as_reference(picture(333, 222), config)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_modes_are_made_rgb_first(mode: str) -> None:
    other = picture(70, 50).convert(mode)
    same_as_reference(to_rgb(other, "x"), ImageConfig())
    # Below the limit the order of the published steps (resize, pad, RGB) changes nothing, but for CMYK's white padding.
    size, grid = image.plan(other.size, ImageConfig())
    canvas = image.canvas(to_rgb(other, "x"), size, grid)
    assert np.array_equal(canvas[:50, :70], np.asarray(other.convert("RGB")))
    assert not canvas[50:].any()
