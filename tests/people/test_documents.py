"""Pages of a PDF and frames of a video, chosen and unchosen."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

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


def locked_pdf() -> bytes:
    """A PDF whose user password is not the empty one: entries O and U that fit no known key."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>",
    ]
    out, offsets = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % at for at in offsets))
    out.write(b"trailer\n<</Size 5/Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>\nstartxref\n%d\n%%%%EOF\n" % start)
    return out.getvalue()


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


@pytest.mark.parametrize(("package", "extra"), [("pypdfium2", "pdf"), ("av", "video")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, pdf: Path, video: Path, package: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match=rf"pip install 'kimi-lite\[{extra}\]'"):
        load_pictures([pdf if extra == "pdf" else video])
