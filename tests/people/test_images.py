"""Pictures of every kind and from every place come out as upright RGB; everything else is one sentence."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from kimi_lite import images
from kimi_lite.errors import UsageError
from kimi_lite.images import load_pictures

Image.init()  # so that Image.OPEN knows all formats

Array = NDArray[np.uint8]


def noise(height: int = 20, width: int = 30, channels: int = 3) -> Array:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def stored(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def opened(data: object) -> Array:
    (picture,) = load_pictures([data])
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image)


PNG = stored(Image.fromarray(noise()))


def test_every_way_in_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a picture#1.png"
    path.write_bytes(PNG)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PNG)))
    encoded = base64.b64encode(PNG).decode()
    ways: list[object] = [path, str(path), path.as_uri().replace("#", "%23"), PNG, bytearray(PNG), "-"]
    ways += [
        f"data:image/png;base64,{encoded}",
        f"DATA:;base64,{encoded.replace('=', '%3D')}",
        Image.fromarray(noise()),
    ]
    for way in ways:
        assert np.array_equal(opened(way), noise()), way


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PNG)
    assert np.array_equal(opened(path), noise())


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_formats_without_loss_keep_every_pixel(format: str) -> None:
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    pixels = noise()
    if format == "GIF":  # 256 colours
        pixels = np.repeat(noise(channels=1)[..., None], 3, 2)
    assert np.array_equal(opened(stored(Image.fromarray(pixels), format, **options)), pixels)


@pytest.mark.skipif("AVIF" not in Image.OPEN, reason="this Pillow was built without AVIF")
def test_an_avif_photograph_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # Colours are coded in YCbCr at 8 bits: up to half a step of each channel, and once more on the way back.
    smooth = np.repeat(np.arange(64, 192, dtype=np.uint8)[None, :, None], 3, 2).repeat(40, 0)
    data = stored(Image.fromarray(smooth), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(opened(data).astype(int) - smooth).max() <= 2
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(UsageError, match=r"an AVIF picture, which this Pillow does not read; pip install"):
        load_pictures([data])


def test_grey_palette_and_one_bit() -> None:
    grey = noise(channels=1)
    assert np.array_equal(opened(stored(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(noise()).quantize(16)
    assert np.array_equal(opened(stored(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(opened(stored(bits))[..., 0], np.where(grey > 127, 255, 0))


def test_sixteen_bits_keep_their_upper_eight() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (9, 11), dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        assert np.array_equal(opened(stored(Image.fromarray(wide), format))[..., 1], wide >> 8)
    as_int = Image.fromarray(wide.astype(np.int32))
    assert np.array_equal(opened(as_int)[..., 0], wide >> 8)


def test_cmyk_is_ink() -> None:
    ink = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert (opened(stored(ink, "TIFF")) == 255).all()
    ink = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert tuple(opened(stored(ink, "TIFF"))[0, 0]) == (0, 255, 255)


def test_transparent_lies_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    expected = [round(255 + (v - 255) * 128 / 255) for v in (200, 100, 50)]
    assert np.abs(opened(stored(half))[0, 0].astype(int) - expected).max() <= 1
    assert (opened(stored(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == 255).all()
    assert (opened(stored(Image.new("LA", (4, 4), (0, 0)))) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (opened(stored(palette, transparency=1)) == 255).all()
    assert tuple(opened(stored(palette))[0, 0]) == (10, 20, 30)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (opened(stored(keyed, transparency=(1, 2, 3))) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_rotations_come_out_upright(orientation: int) -> None:
    upright = noise()
    undo: Any = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(Image.fromarray(np.ascontiguousarray(undo(upright))), exif=exif)
    assert np.array_equal(opened(data), upright)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
        data = stored(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert tuple(opened(data)[0, 0]) == (255, 0, 0)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header may claim anything."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"GIF89a", "not a picture|damaged"),
        (b"<html><body>404</body></html>", r"begins with b'<html><b'"),
        (SVG, "an SVG drawing"),
        (b"<svg/>", "an SVG drawing"),
        (PNG[:-40], "damaged or cut short"),
        (PNG[: len(PNG) // 2], "damaged or cut short"),
        (png(0, 5), "damaged|at least one|not a picture"),
        (png(50000, 50000), "million"),
        (png(12000, 12000), "12000×12000 pixels, more than 100 million"),
        (png(2000, 2000, b"\0" * 100), "damaged or cut short"),
        (stored(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
    ],
)
def test_what_is_no_picture_is_one_sentence(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        load_pictures([data])
    assert str(error.value).count("\n") == 0


WHOLE = [stored(Image.fromarray(noise()), f) for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), st.data())
def test_damage_anywhere_gives_a_picture_or_one_sentence(whole: bytes, draw: st.DataObject) -> None:
    data = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(data)))
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            (picture,) = load_pictures([damaged])
            assert picture.image.mode == "RGB"
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", never)
    for side in (10_001, 13_000, 50_000, 2**31 - 1):
        with pytest.raises(UsageError, match="million"):
            load_pictures([png(side, side)])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere/photo.png", "/nowhere/photo.png: not found"),
        ("/", "/: a directory"),
        ("/dev/zero", "not a regular file"),
        ("a\0b.png", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:,hello", "not a picture"),
        (12, "given as int"),
        (None, "given as NoneType"),
    ],
)
def test_a_place_without_a_picture_is_one_sentence(source: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pictures([source])


def test_too_many_bytes_are_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    path = tmp_path / "long.png"
    path.write_bytes(PNG + bytes(1 << 20))
    with pytest.raises(UsageError, match="more than 1 MB"):
        load_pictures([path])
    with pytest.raises(UsageError, match="more than 1 MB"):
        load_pictures(["data:;base64," + "A" * (2 << 20)])


def test_offline_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail("a name was looked up"))
    with pytest.raises(UsageError, match="--offline is set"):
        load_pictures(["https://example.org/x.png"], offline=True)


def test_a_selection_needs_something_to_select_from(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with pytest.raises(UsageError, match="selects in PDFs and videos"):
        load_pictures([f"{path}#pages=1"])
