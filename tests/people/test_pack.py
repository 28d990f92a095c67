"""`kimi-lite pack` and `kimi-lite quantize` as a person runs them: one file that answers, or one sentence."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.formats.gguf_file import mmproj_beside
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.reference.pictures import scene

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano"
COLOUR = "What colour is it?"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kimi_lite", *map(str, arguments)]
    return subprocess.run(line, input="", capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano as standard GGUF, its image side beside it."""
    path = tmp_path_factory.mktemp("standard") / "m.gguf"
    quantize(NANO, path, to="q8_0")
    assert mmproj_beside(path).exists()
    return path


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    scene("red", "circle", 1, (3, 3), np.random.default_rng(0))[0].save(path)
    return path


def test_pack_makes_one_file_that_reads_and_sees(standard: Path, red: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.gguf"
    done = command("pack", standard, out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert done.stderr == f"{out.stat().st_size / 1e9:.2f} GB\n"
    assert [p.name for p in tmp_path.iterdir()] == ["packed.gguf"]
    assert command("ask", "-q", "-m", out, "What is 38 + 47?").stdout == "85\n"
    assert command("ask", "-q", "-m", out, "--image", red, COLOUR).stdout == "red\n"
    assert "pictures  in this file" in command("info", out).stdout


def test_an_image_side_from_elsewhere_is_named(standard: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.gguf").symlink_to(standard)
    assert "pictures  none" in command("info", tmp_path / "alone.gguf").stdout
    for given, pictures in (
        ([], "none: the file holds no image side"),
        (["--mmproj", mmproj_beside(standard)], "in this file"),
    ):
        done = command("pack", tmp_path / "alone.gguf", tmp_path / "out.gguf", *given)
        assert done.returncode == 0
        assert f"pictures  {pictures}" in command("info", tmp_path / "out.gguf").stdout


def test_quantize_makes_one_file_that_sees(red: Path, tmp_path: Path) -> None:
    done = command("quantize", NANO, tmp_path / "m.gguf", "--verify")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'm.gguf'}\n")
    assert "v.blk.0.attn_qkv.weight" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert command("ask", "-q", "-m", tmp_path / "m.gguf", "--image", red, COLOUR).stdout == "red\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.gguf", "out.gguf"], 3, "none.gguf: not found"),
        (["m.gguf", "m.gguf"], 2, "cannot take the place of one that it is made from"),
        (["m.gguf", "m-mmproj.gguf"], 2, "cannot take the place of one that it is made from"),
        (["m.gguf", "folder"], 2, "is a directory"),
        (["m.gguf", "out.gguf", "--mmproj", "none.gguf"], 3, "none.gguf: not found"),
        (["m.gguf", "out.gguf", "--mmproj", "m.gguf"], 3, "expected an image side of Kimi-VL"),
        (["m-mmproj.gguf", "out.gguf"], 3, "expected 'deepseek2'"),
        (["m.gguf", "folder/none/out.gguf"], 3, "does not exist"),
    ],
)
def test_what_cannot_be_packed_is_one_sentence_and_a_code(
    standard: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "folder").mkdir()
    for path in (standard, mmproj_beside(standard)):
        (tmp_path / path.name).symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    done = command("pack", *(a if a.startswith("--") else tmp_path / a for a in arguments))
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
