"""GGUF, safetensors and packed layouts: byte literals, the reference packages in both directions, damaged files."""

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_model import unpack as slow_unpack
from random_matrix import random_scales
from safetensors.torch import load_file

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.ggml_types import BY_NAME, BY_NUMBER
from kimi_lite.formats.gguf_file import LARGE_PAGE, GgufFile, GgufWriter, TensorSpec
from kimi_lite.formats.packed import (
    QUANTIZED,
    join_mlp,
    mlp_bytes,
    pack_quantized,
    split_mlp,
    unpack,
    unpack_quantized,
)
from kimi_lite.formats.safetensors_file import open_checkpoint
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint


def test_the_header_of_a_small_file_is_these_bytes(tmp_path: Path) -> None:
    with GgufWriter(tmp_path / "x.gguf", {"a": 7}, [TensorSpec("t", "F32", (2, 3))]) as out:
        out.write(np.arange(6, dtype=np.float32))
    head = b"GGUF\x03\0\0\0" + b"\x01" + b"\0" * 7 + b"\x01" + b"\0" * 7  # version, one tensor, one key
    head += b"\x01" + b"\0" * 7 + b"a" + b"\x04\0\0\0" + b"\x07\0\0\0"  # key "a", u32 7
    head += (
        b"\x01" + b"\0" * 7 + b"t" + b"\x02\0\0\0" + b"\x03" + b"\0" * 7 + b"\x02" + b"\0" * 7
    )  # sizes, fastest first
    head += b"\0\0\0\0" + b"\0" * 8  # F32 at offset 0
    head += b"\0" * (-len(head) % 32)
    data = np.arange(6, dtype="<f4").tobytes()
    assert (tmp_path / "x.gguf").read_bytes() == head + data + b"\0" * 8


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    metadata = {
        "s": "ü",
        "u": 3,
        "i": -3,
        "f": 0.5,
        "b": True,
        "as": ["x", "y"],
        "ai": [1, 2],
        "af": [0.5, 1.5],
    }
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    path = tmp_path / "x.gguf"
    q8 = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    specs = [TensorSpec("a", "Q8_0", (4, 64)), TensorSpec("b", "I8", (5,))]
    with GgufWriter(path, {**metadata, "general.alignment": 4096}, specs, 4096) as out:
        out.write(q8[:1])
        out.write(q8[1:])
        out.write(np.arange(5, dtype=np.int8))
    reader = gguf.GGUFReader(path)
    assert {k: reader.fields[k].contents() for k in metadata} == metadata
    assert np.array_equal(reader.tensors[0].data, q8)
    assert reader.tensors[1].data_offset % 4096 == 0
    ours = GgufFile(path)
    assert {k: ours.metadata[k] for k in metadata} == metadata
    assert np.array_equal(ours.tensors["a"].float32(), gguf.dequantize(q8, gguf.GGMLQuantizationType.Q8_0))


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_array("tokens", [f"t{i}" for i in range(1000)])
    writer.add_uint64("big", 2**40)
    values = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float16)
    writer.add_tensor("x", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufFile(path)
    assert ours.metadata["tokens"][999] == "t999"
    assert ours.metadata["big"] == 2**40
    assert np.array_equal(ours.tensors["x"].float32(), values.astype(np.float32))


def test_the_types_are_those_of_the_gguf_package() -> None:
    theirs = {t.name: (t.value, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {t.name: (t.number, t.elements, t.bytes) for t in BY_NAME.values()} == theirs
    assert {number: t.name for number, t in BY_NUMBER.items()} == {theirs[n][0]: n for n in theirs}


def test_strings_that_nobody_wants_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    metadata = {"general.architecture": "x", "merges": ["a b", "", "é ü"], "after": 7}
    with GgufWriter(path, metadata, [TensorSpec("t", "F32", (8,))]) as out:
        out.write(np.arange(8, dtype=np.float32))
    ours, whole = GgufFile(path, without=("merges",)), GgufFile(path)
    assert ours.metadata == {key: value for key, value in whole.metadata.items() if key != "merges"}
    assert np.array_equal(ours.tensors["t"].float32(), np.arange(8))


@pytest.mark.parametrize("length", [10**6, 2**62, 2**63, 2**64 - 1])
def test_damage_in_what_is_passed_over_is_one_sentence(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.gguf"
    with GgufWriter(path, {"merges": ["one", "two", "six"]}, [TensorSpec("t", "F32", (8,))]) as out:
        out.write(np.zeros(8, np.float32))
    damaged = path.read_bytes().replace(struct.pack("<Q", 3) + b"two", struct.pack("<Q", length) + b"two")
    path.write_bytes(damaged)
    with pytest.raises(
        ModelFileError,
        match=r"x\.gguf: the file ends inside the array of strings at \d+; the file is damaged",
    ):
        GgufFile(path, without=("merges",))


def good_file(path: Path) -> bytearray:
    with GgufWriter(
        path, {"general.architecture": "x"}, [TensorSpec("one", "F32", (8,)), TensorSpec("two", "F32", (8,))]
    ) as out:
        out.write(np.zeros(16, np.float32)[:8])
        out.write(np.zeros(8, np.float32))
    return bytearray(path.read_bytes())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "not 'GGUF'|GGUF": lambda b: b"GGML" + b[4:],
    "version 99": lambda b: b[:4] + struct.pack("<I", 99) + b[8:],
    "too few": lambda b: b[:20],
    "the file ends|needs .* bytes": lambda b: b[:-40],
    "claims .* tensors": lambda b: b[:8] + struct.pack("<Q", 2**63) + b[16:],
    "the file ends at": lambda b: b[:24] + struct.pack("<Q", 2**62) + b[32:],
    "UTF-8": lambda b: b.replace(b"general.arch", b"\xff\xfeneral.arch"),
    "stands there twice": lambda b: b.replace(b"two", b"one"),
    "unknown type": lambda b: b.replace(
        b"one" + struct.pack("<IQI", 1, 8, 0), b"one" + struct.pack("<IQI", 1, 8, 77)
    ),
    "dimensions": lambda b: b.replace(b"one" + struct.pack("<I", 1), b"one" + struct.pack("<I", 9)),
    r"needs \d+ bytes": lambda b: b.replace(
        b"two" + struct.pack("<IQ", 1, 8), b"two" + struct.pack("<IQ", 1, 2**60)
    ),
    "not a multiple": lambda b: b.replace(
        struct.pack("<IQIQ", 1, 8, 0, 32), struct.pack("<IQIQ", 1, 8, 0, 33)
    ),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_gguf_is_one_sentence(tmp_path: Path, says: str) -> None:
    path = tmp_path / "x.gguf"
    whole = good_file(path)
    damaged = DAMAGE[says](bytes(whole))
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(ModelFileError, match=says) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.data())
def test_random_damage_never_escapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    raw = good_file(path)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(ModelFileError):
        GgufFile(path)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages"
)
def test_a_file_is_mapped_for_large_pages_and_brought_in_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    n = (9 << 20) // 4
    with GgufWriter(path, {}, [TensorSpec("t", "F32", (n,))]) as out:
        out.write(np.ones(n, np.float32))
    file = GgufFile(path)
    whole = np.frombuffer(file.map, np.uint8)
    smaps = Path("/proc/self/smaps").read_text().split(str(path), 1)[1]
    assert "hg" in smaps.split("VmFlags:", 1)[1].splitlines()[0].split()
    file.bring_in().join()
    resident = (ctypes.c_ubyte * -(-whole.size // mmap.PAGESIZE))()
    address = ctypes.c_void_p(whole.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(whole.size), resident) == 0
    assert all(page & 1 for page in resident[:: LARGE_PAGE // mmap.PAGESIZE])
    file.bring_in(lambda name: False).join()  # nothing is wanted


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such advice")
def test_what_was_written_does_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("fsync", handle)))
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: calls.append(a))
    with GgufWriter(tmp_path / "x.gguf", {}, [TensorSpec("t", "I8", (5,))]) as out:
        out.write(np.zeros(5, np.int8))
    (_, handle), advice = calls  # only what is on the disk can be let go of
    assert advice == (handle, 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with GgufWriter(tmp_path / "x.gguf", {}, [TensorSpec("t", "F32", (8,))]) as out:
            out.write(np.zeros(3, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_keeps_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    before = bytes(good_file(path))
    with pytest.raises(RuntimeError), GgufWriter(path, {}, [TensorSpec("t", "F32", (8,))]):
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("layout", QUANTIZED)
@given(st.integers(1, 50), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_packing_can_be_undone_and_follows_the_specification(layout: str, O: int, G: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high, step = {"q8g32": (-127, 128, 1), "q3b32": (0, 8, 2)}.get(layout, (0, 16, 1))
    q = (step * rng.integers(low, high, (O, 32 * G))).astype(np.int8)
    scale = random_scales(rng, layout, (O, G), 1)
    data = pack_quantized(q, scale, layout)
    q2, scale2 = unpack_quantized(data, layout, O, 32 * G)
    assert np.array_equal(q, q2)
    assert np.array_equal(scale, scale2)
    assert np.array_equal(
        unpack(data, layout, O, 32 * G), slow_unpack(data, layout, O, 32 * G).astype(np.float32)
    )


def test_the_worked_example_of_the_documentation() -> None:
    q = np.full((16, 32), 8, np.int8)
    q[0, :8] = [1, 2, 3, 4, 5, 6, 7, 9]
    q[1, 0] = 15
    scale = np.full((16, 1), 2.0**-15, np.float16)
    scale[:2, 0] = 1.0, -0.3125
    data = pack_quantized(q, scale, "q4b32")
    assert data[:5].tolist() == [0x51, 0x62, 0x73, 0x94, 0x8F]
    assert data[256:260].tolist() == [0x78, 0xEA, 0x00, 0x00]
    assert len(data) == 272
    data = pack_quantized(q, scale, "q4g32")
    assert data[:5].tolist() == [0x51, 0x62, 0x73, 0x94, 0x8F]
    assert data[256:260].tolist() == [0x00, 0x3C, 0x00, 0xB5]
    assert len(data) == 288
    q[0, :8], q[0, 24:] = [0, 2, 4, 6, 8, 10, 12, 14], [2, 4, 8, 0, 14, 8, 8, 8]
    q[1, 0] = 14
    data = pack_quantized(q, scale, "q3b32")
    assert data[:5].tolist() == [0x91, 0xA2, 0xC4, 0xE6, 0x8E]
    assert [data[64 * t : 64 * t + 4].tolist() for t in (1, 2)] == [
        [0x98, 0x89, 0x88, 0x88],
        [0x98, 0x98, 0x99, 0x98],
    ]
    assert data[192:196].tolist() == [0x78, 0xEA, 0x00, 0x00]
    assert len(data) == 208


def test_an_mlp_run_takes_gate_and_up_in_turn_then_down() -> None:
    rng = np.random.default_rng(2)
    gate, up, down = (rng.integers(0, 256, n, dtype=np.uint8) for n in (2 * 272 * 2, 2 * 272 * 2, 4 * 272))
    run = join_mlp(gate, up, down, "q4b32", 64)
    assert run.size == mlp_bytes("q4b32", 32, 64) == 4096
    assert np.array_equal(run[: 2 * 272], gate[: 2 * 272])
    assert np.array_equal(run[2 * 272 : 4 * 272], up[: 2 * 272])
    for a, b in zip(split_mlp(run, "q4b32", 32, 64), (gate, up, down), strict=True):
        assert np.array_equal(a, b)


def test_safetensors_rows_equal_the_packages(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, vision=None)
    tensors = open_checkpoint(directory)
    seen = 0
    for shard in directory.glob("*.safetensors"):
        for name, expected in load_file(shard).items():
            assert np.array_equal(tensors[name].rows(), expected.float().numpy())
            assert np.array_equal(tensors[name].rows(1, 2), expected[1:3].float().numpy())
            seen += 1
    assert seen == len(tensors) > 50
