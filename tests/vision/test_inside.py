"""The image side inside the packed file: the separate file's bits, read where they lie, when a picture comes."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rewrite import rewritten, without_image_side

import kimi_lite
from kimi_lite.doctor import file_report
from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import matrix_bytes
from kimi_lite.pack import pack
from kimi_lite.quantize.convert import quantize
from kimi_lite.quantize.verify import tensor_errors
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, TINY_VISION, write_checkpoint
from kimi_lite.runtime.vision import ImageEncoder, encode, open_vision

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano"
HUGE = 2 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random`, whose q, k and v do not end at whole row blocks, and `nano`: packed, and as GGUF with an mmproj."""
    out = tmp_path_factory.mktemp("inside")
    write_checkpoint(out / "random")
    (out / "nano").symlink_to(NANO)
    for name in ("random", "nano"):
        for to in ("int4", "bf16", "q8_0"):
            quantize(out / name, out / f"{name}-{to}.gguf", to=to)
    return out


def rows(side: Path) -> list[NDArray[np.float32]]:
    weights = open_vision(side)
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (84, 140), (252, 168)]
    return encode(weights, [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes])


def same(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["random", "nano"])
def test_embeddings_from_inside_equal_those_of_the_separate_file(folder: Path, name: str) -> None:
    assert not (folder / f"{name}-int4-mmproj.gguf").exists()
    assert same(rows(folder / f"{name}-int4.gguf"), rows(folder / f"{name}-bf16-mmproj.gguf"))


@pytest.mark.parametrize("text", ["q8_0", "int4", "bf16"])
@pytest.mark.parametrize("side", ["q8_0", "bf16"])
def test_pack_puts_the_image_side_inside_without_changing_a_bit(
    folder: Path, tmp_path: Path, text: str, side: str
) -> None:
    for name in ("random", "nano"):
        out, mmproj = tmp_path / f"{name}.gguf", folder / f"{name}-{side}-mmproj.gguf"
        pack(folder / f"{name}-{text}.gguf", out, mmproj=mmproj)
        assert same(rows(out), rows(mmproj))
        question = "What is 38 + 47?"
        if name == "nano":
            expected = kimi_lite.load(folder / f"{name}-{text}.gguf").ask(question, max_tokens=8)
            assert kimi_lite.load(out).ask(question, max_tokens=8).text == expected.text


def test_pack_takes_the_image_side_that_lies_beside(folder: Path, tmp_path: Path) -> None:
    for end in ("", "-mmproj"):
        (tmp_path / f"m{end}.gguf").symlink_to(folder / f"nano-q8_0{end}.gguf")
    n_bytes: list[tuple[int, int]] = []
    pack(tmp_path / "m.gguf", tmp_path / "out.gguf", lambda name, done, total: n_bytes.append((done, total)))
    assert same(rows(tmp_path / "out.gguf"), rows(folder / "nano-q8_0-mmproj.gguf"))
    assert n_bytes[-1][0] == n_bytes[-1][1]
    with pytest.raises(UsageError, match="packed already"):
        pack(tmp_path / "out.gguf", tmp_path / "again.gguf")
    # What quantize writes at once is what pack makes of its parts.
    text = without_image_side(folder / "nano-int4.gguf", tmp_path / "text.gguf")
    pack(text, tmp_path / "both.gguf", mmproj=folder / "nano-bf16-mmproj.gguf")
    ours, theirs = (GgufFile(p).tensors for p in (tmp_path / "both.gguf", folder / "nano-int4.gguf"))
    assert list(ours) == list(theirs)
    assert all(np.array_equal(ours[n].data, theirs[n].data) for n in ours)
    assert all(ours[n].shape == theirs[n].shape for n in ours)


def test_pack_writes_down_the_limit_that_stood_beside_the_file(folder: Path, tmp_path: Path) -> None:
    def foreign(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        del metadata["kimi_lite.in_token_limit"]
        metadata["general.name"] = "Kimi VL A3B Thinking 2506"

    side = rewritten(folder / "nano-q8_0-mmproj.gguf", tmp_path / "theirs.gguf", foreign)
    pack(folder / "nano-q8_0.gguf", tmp_path / "out.gguf", mmproj=side)
    assert ImageEncoder(tmp_path / "out.gguf", 256, ImageCache(None)).image.token_limit == 16384


def test_the_gguf_package_lists_the_image_side(folder: Path) -> None:
    reader = gguf.GGUFReader(folder / "random-int4.gguf")
    W, F, D, P = TINY_VISION.hidden_size, TINY_VISION.ffn_size, TINY_TEXT.hidden_size, TINY_VISION.grid_height
    matrices = {"mm.1": (4 * W, 4 * W), "mm.2": (D, 4 * W)}
    floats: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": (14, 14, 3, W), "v.patch_embd.bias": (W,)}
    floats["v.position_embd.weight"] = (W, P * P)
    norms = ["v.post_ln", "mm.input_norm"]
    for i in range(TINY_VISION.n_layers):
        at = f"v.blk.{i}."
        matrices |= {f"{at}attn_qkv": (3 * W, W), f"{at}attn_out": (W, W)}
        matrices |= {f"{at}ffn_up": (F, W), f"{at}ffn_down": (W, F)}
        norms += [f"{at}ln1", f"{at}ln2"]
    floats |= {f"{n}.{end}": (W,) for n in norms for end in ("weight", "bias")}
    floats |= {f"{n}.bias": (shape[0],) for n, shape in matrices.items()}
    found = {t.name: t for t in reader.tensors if t.name.startswith(("v.", "mm."))}
    assert {n: tuple(map(int, t.shape)) for n, t in found.items() if t.tensor_type.name == "F32"} == floats
    packed = {f"{n}.weight": (matrix_bytes("q8g32", *shape),) for n, shape in matrices.items()}
    assert {n: tuple(map(int, t.shape)) for n, t in found.items() if t.tensor_type.name == "I8"} == packed
    table = dict(
        zip(*(reader.fields[f"kimi_lite.packed.{k}"].contents() for k in ("name", "layout")), strict=True)
    )
    assert all(table[name] == "q8g32" for name in packed)
    assert reader.fields["clip.projector_type"].contents() == "kimivl"
    assert reader.fields["general.architecture"].contents() == "deepseek2"


def test_verify_reports_the_image_side_too(folder: Path) -> None:
    errors = dict(tensor_errors(folder / "random", folder / "random-int4.gguf"))
    assert (
        0.003 < errors["v.blk.2.attn_qkv.weight"] < 0.009
    )  # 8 bits: half a step of absmax / 127, over the rms
    assert errors["v.patch_embd.weight"] == errors["mm.1.bias"] == 0


def resident_pages(path: Path, start: int, stop: int) -> int:
    """Pages of a file's bytes start…stop that this process has in its page table, through any of its maps."""
    page, n = 4096, 0
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as table:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) < 6 or fields[5].strip() != str(path):
                continue
            low, high = (int(part, 16) for part in fields[0].split("-"))
            offset = int(fields[2], 16)
            first, last = max(start, offset), min(stop, offset + high - low)
            if first < last:
                table.seek((low + first - offset) // page * 8)
                entries = table.read((last - first) // page * 8)
                n += sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))
    return n


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")
def test_the_image_side_is_not_read_before_a_picture_comes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((folder / "nano-int4.gguf").read_bytes())
    file = GgufFile(path)
    base = np.frombuffer(file.map, np.uint8).__array_interface__["data"][0]
    places = [
        (t.data.__array_interface__["data"][0] - base, t.data.size)
        for n, t in file.tensors.items()
        if n.startswith(("v.", "mm."))
    ]
    # The system maps files in pieces of up to 2 MB, so what shares one with the end of the text model does not count.
    start, stop = -(-min(places)[0] // HUGE) * HUGE, (max(places)[0] + max(places)[1]) // 4096 * 4096
    pages = (stop - start) // 4096
    assert pages > 500
    del file
    model = kimi_lite.load(path)
    assert model.ask("What is 38 + 47?").text == "85"
    assert resident_pages(path, start, stop) == 0
    model.encode([Image.new("RGB", (84, 84), "red")])
    assert resident_pages(path, start, stop) > 0.9 * pages


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda metadata, tensors: tensors.pop(name)


def entry(name: str, key: str, value: object) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        at = metadata["kimi_lite.packed.name"].index(name)
        metadata[f"kimi_lite.packed.{key}"][at] = value

    return change


def cut(name: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        kind, (size,), data = tensors[name]
        tensors[name] = (kind, (size - 544,), data[:-544])

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("mm.2.weight"), r"'mm\.2\.weight' is missing"),
        (drop("v.blk.1.attn_qkv.weight"), r"'v\.blk\.1\.attn_qkv\.weight' is missing"),
        (drop("v.blk.0.ffn_up.bias"), r"'v\.blk\.0\.ffn_up\.bias' is missing"),
        (drop("v.position_embd.weight"), r"'v\.position_embd\.weight' is missing"),
        (
            entry("v.blk.2.attn_out.weight", "rows", 80),
            r"'v\.blk\.2\.attn_out\.weight' has shape .*, expected",
        ),
        (entry("mm.1.weight", "name", "other"), r"'mm\.1\.weight' has shape \[\d+\], expected \[288, 288\]"),
        (entry("mm.1.weight", "layout", "q4g32"), r"'mm\.1\.weight' has shape \[\d+\], expected \[\d+\]"),
        (
            cut("v.blk.2.ffn_down.weight"),
            r"'v\.blk\.2\.ffn_down\.weight' has shape \[\d+\], expected \[\d+\]",
        ),
        (lambda m, t: m.update({"clip.vision.block_count": 4}), r"'v\.blk\.3\.ln1\.weight' is missing"),
        (lambda m, t: m.update({"clip.vision.projection_dim": 512}), "belongs to another model"),
        (lambda m, t: m.update({"clip.projector_type": "kimik25"}), "expected an image side of Kimi-VL"),
        (
            lambda m, t: t.update({"mm.2.bias": ("I8", (256,), t["mm.2.bias"][2][:256])}),
            "type I8, which holds no weights",
        ),
    ],
)
def test_a_damaged_image_side_is_one_sentence(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], says: str
) -> None:
    wrong = rewritten(folder / "random-int4.gguf", tmp_path / "wrong.gguf", change)
    with pytest.raises(ModelFileError, match=says) as error:
        kimi_lite.load(wrong).encode([Image.new("RGB", (28, 28))])
    assert "\n" not in str(error.value)
    with pytest.raises(ModelFileError, match=says):  # and `info` says so before anyone asks
        list(file_report(wrong))


def test_a_file_that_is_named_or_lies_beside_goes_before_what_is_inside(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.symlink_to(folder / "nano-int4.gguf")

    def used(**arguments: Any) -> Path:
        encoder = kimi_lite.load(model, **arguments).encoder
        assert encoder is not None
        return encoder.file.path

    def pictures() -> str:
        return next(line for line in file_report(model) if line.startswith("pictures"))

    named = folder / "nano-bf16-mmproj.gguf"
    assert used() == model
    assert "in this file" in pictures()
    assert used(mmproj=named) == named
    (tmp_path / "m-mmproj.gguf").symlink_to(folder / "nano-q8_0-mmproj.gguf")
    assert used() == tmp_path / "m-mmproj.gguf"
    assert "in m-mmproj.gguf beside it" in pictures()
    assert used(mmproj=named) == named
    for write in (lambda p: quantize(NANO, p), lambda p: pack(folder / "nano-q8_0.gguf", p)):
        model.unlink()
        with pytest.warns(KimiLiteWarning, match=r"m-mmproj\.gguf lies beside m\.gguf and is used in place"):
            write(model)


def test_a_file_without_an_image_side_says_so(folder: Path, tmp_path: Path) -> None:
    text = without_image_side(folder / "nano-int4.gguf", tmp_path / "text.gguf")
    model = kimi_lite.load(text)
    assert model.encoder is None
    with pytest.raises(UsageError, match=r"no image side inside, and \S+text-mmproj\.gguf is not there"):
        model.encode([Image.new("RGB", (28, 28))])
    assert "pictures  none" in "\n".join(file_report(text))
    with pytest.raises(ModelFileError, match="expected an image side of Kimi-VL"):
        kimi_lite.load(text, mmproj=text)
