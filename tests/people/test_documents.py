"""Pages of a PDF, frames of a video, chosen and unchosen, and photographs in HEIC."""

import io
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pillow_heif
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from kimi_lite import isolated
from kimi_lite.errors import UsageError
from kimi_lite.images import load_pictures

COLOURS = ["red", "lime", "blue", "yellow", "black"]


@pytest.fixture(scope="module")
def pdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pdf") / "pages.pdf"
    pages = [Image.new("RGB", (144 + 72 * i, 72), colour) for i, colour in enumerate(COLOURS)]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds at ten frames a second; the second's number is its shade."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(50):
            grey = np.full((48, 64, 3), 20 + 50 * (i // 10), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey)):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def shades(sources: list[object]) -> list[int]:
    return [round((float(np.asarray(p.image).mean()) - 20) / 50) for p in load_pictures(sources)]


def colours(sources: list[object]) -> list[tuple[int, ...]]:
    return [tuple(round(v / 255) for v in np.asarray(p.image).mean((0, 1))) for p in load_pictures(sources)]


def test_pages_come_in_order_at_144_dots_an_inch(pdf: Path) -> None:
    found = load_pictures([str(pdf)])
    assert [p.image.size for p in found] == [(288 + 144 * i, 144) for i in range(5)]
    assert colours([pdf]) == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)]
    assert found[2].name == f"{pdf} page 3"


def test_pages_are_selected_by_number(pdf: Path) -> None:
    assert colours([f"{pdf}#pages=4,1-2"]) == [(1, 1, 0), (1, 0, 0), (0, 1, 0)]
    assert colours([pdf.read_bytes()]) == colours([pdf])


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("pages=6", "no page 6; the PDF has 5"),
        ("pages=0", "no page 0"),
        ("pages=3-2", "no page 3-2"),
        ("pages=one", "not a list of pages"),
        ("pages=1,1-5,1-5,1-5,1-5,1-5,1-5,1-5", "more than 32 pages"),
        ("frames=2", "this is a PDF"),
    ],
)
def test_pages_that_are_not_there_are_one_sentence(pdf: Path, which: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pictures([f"{pdf}#{which}"])


def test_a_long_pdf_is_never_cut_silently(tmp_path: Path) -> None:
    page, path = Image.new("RGB", (8, 8)), tmp_path / "long.pdf"
    page.save(path, save_all=True, append_images=[page] * 39)
    with pytest.raises(UsageError, match=r"40 pages; choose up to 32, such as .*#pages=1-16"):
        load_pictures([path])
    assert len(load_pictures([f"{path}#pages=5-36"])) == 32


def pdf_of(objects: list[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of numbered objects, the first of which is the catalogue."""
    out, offsets = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start, n = out.tell(), len(objects) + 1
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % n)
    out.write(b"".join(b"%010d 00000 n \n" % at for at in offsets))
    out.write(b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (n, trailer, start))
    return out.getvalue()


def page_of(side: int, contents: bytes, resources: bytes, *others: bytes) -> bytes:
    """One square page; `others` are the objects from 5 up that its resources name."""
    head = b"/Type/Page/Parent 2 0 R/Contents 4 0 R"
    page = b"<<%s/MediaBox[0 0 %d %d]/Resources<<%s>>>>" % (head, side, side, resources)
    tree = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>"]
    return pdf_of([*tree, page, stream(b"", contents), *others])


def stream(head: bytes, body: bytes) -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (head, len(body), body)


def locked_pdf() -> bytes:
    """A PDF whose user password is not the empty one: entries O and U that fit no known key."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>",
    ]
    return pdf_of(objects, b"/Encrypt 4 0 R/ID[<00><00>]")


def endless_page() -> bytes:
    """A square of 1400 points filled with a pattern that repeats every hundredth of a point: 2e10 copies."""
    tile = b"/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 10 10]/XStep 0.01/YStep 0.01/Resources<<>>"
    pattern = stream(tile, b"1 0 0 rg 0 0 9 9 re f 0 1 0 rg 2 2 3 3 re f")
    fill = b"/Pattern cs /P scn 0 0 1400 1400 re f"
    return page_of(1400, fill, b"/Pattern<</P 5 0 R>>", pattern)


def swelling_page() -> bytes:
    """A form that draws a form eight times, and so on, 25 deep: each drawing is an object in the renderer's memory."""
    head = b"/Type/XObject/Subtype/Form/BBox[0 0 72 72]"
    forms = [
        stream(head + b"/Resources<</XObject<</X %d 0 R>>>>" % (6 + i), b"/X Do " * 8) for i in range(25)
    ]
    return page_of(72, b"/X Do ", b"/XObject<</X 5 0 R>>", *forms, stream(head, b"0 0 72 72 re f"))


@pytest.mark.parametrize(
    ("data", "says"),
    [(locked_pdf(), "protected by a password"), (b"%PDF-1.7\nnothing", "a damaged PDF")],
)
def test_a_pdf_that_does_not_open_is_one_sentence(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pictures([data])


def test_frames_are_spread_evenly_or_chosen_by_time(video: Path) -> None:
    assert shades([str(video)]) == [0, 0, 1, 2, 2, 3, 4, 4]  # the middles of eight parts of five seconds
    assert shades([f"{video}#frames=5"]) == [0, 1, 2, 3, 4]
    assert shades([f"{video}#times=4.05,0,2.55"]) == [4, 0, 2]
    assert shades([video.read_bytes()]) == shades([video])


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("frames=0", "not understood"),
        ("frames=many", "not understood"),
        ("frames=99", "at most 32"),
        ("times=9", "lasts 5.0 seconds"),
        ("times=-1", "lies outside"),
        ("times=nan", "lies outside"),
        ("pages=1", "this is a video"),
    ],
)
def test_frames_that_are_not_there_are_one_sentence(video: Path, which: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pictures([f"{video}#{which}"])


def test_a_damaged_video_is_one_sentence(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(video.read_bytes()[:200])
    with pytest.raises(UsageError, match="a damaged video"):
        load_pictures([path])


def heic(picture: Image.Image, orientation: int = 1) -> bytes:
    """Without loss: RGB itself is coded, at full resolution. The orientation is a property of the container, too."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    whole = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
    pillow_heif.encode("RGB", picture.size, picture.tobytes(), out, exif=exif.tobytes(), **whole)
    return out.getvalue()


def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def test_a_heic_photograph_comes_out_as_it_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(heic(Image.fromarray(noise())))
    (found,) = load_pictures([path])
    assert (found.image.mode, found.name) == ("RGB", str(path))
    assert np.array_equal(np.asarray(found.image), noise())


def test_a_heic_photograph_is_shown_upright() -> None:
    lying = np.ascontiguousarray(np.rot90(noise(), 1))  # orientation 6: the camera was turned
    (found,) = load_pictures([heic(Image.fromarray(lying), orientation=6)])
    assert np.array_equal(np.asarray(found.image), noise())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(99), "a damaged HEIC picture"),
        (heic(Image.fromarray(noise()))[:-500], "a damaged HEIC picture"),
        (heic(Image.fromarray(noise()))[:300], "a damaged HEIC picture"),
    ],
)
def test_a_damaged_heic_is_one_sentence(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        load_pictures([data])
    assert "\n" not in str(error.value)


def test_nothing_is_selected_in_a_photograph(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(heic(Image.fromarray(noise())))
    with pytest.raises(UsageError, match="#pages= selects in PDFs and videos, but this is neither"):
        load_pictures([f"{tmp_path / 'a.heic'}#pages=1"])


@pytest.mark.parametrize(
    ("package", "extra"), [("pypdfium2", "pdf"), ("av", "video"), ("pillow_heif", "heic")]
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, pdf: Path, video: Path, package: str, extra: str
) -> None:
    given = {"pdf": pdf, "video": video, "heic": heic(Image.fromarray(noise()))}[extra]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match=rf"pip install 'kimi-lite\[{extra}\]'"):
        load_pictures([given])


@pytest.mark.parametrize(
    ("kind", "seconds", "memory", "says"),
    [
        ("endless page", 1.5, 2 << 30, r"the picture page 1: takes more than 1\.5 seconds"),
        ("swelling page", 30.0, 96 << 20, r"the picture page 1: takes more than 0\.0938 GB of memory"),
        ("video", 0.001, 2 << 30, r"the picture: takes more than 0\.001 seconds"),
        ("video", 30.0, 1 << 20, r"the picture.*: takes more than 0\.000977 GB of memory"),
    ],
)
def test_what_takes_too_long_or_too_much_memory_is_ended_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, video: Path, kind: str, seconds: float, memory: int, says: str
) -> None:
    monkeypatch.setattr(isolated, "SECONDS", seconds)
    monkeypatch.setattr(isolated, "MEMORY_BYTES", memory)
    made = {"endless page": endless_page, "swelling page": swelling_page, "video": video.read_bytes}
    started = time.monotonic()
    with pytest.raises(UsageError, match=says) as error:
        load_pictures([made[kind]()])
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10  # and not the hours or gigabytes that it would have been
    assert psutil.Process().children() == []


def test_a_decoder_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch, pdf: Path) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(UsageError, match=r"pages\.pdf: its decoder broke off \(code 1\)"):
        load_pictures([pdf])


def test_the_clock_begins_anew_with_every_page(monkeypatch: pytest.MonkeyPatch, pdf: Path) -> None:
    waits: list[float] = []
    real = isolated._Watch.renew

    def renew(watch: isolated._Watch) -> None:
        waits.append(time.monotonic())
        real(watch)

    monkeypatch.setattr(isolated._Watch, "renew", renew)
    assert len(load_pictures([pdf])) == 5
    assert len(waits) == 6  # at the start and after each page
