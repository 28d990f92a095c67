"""A calibration that is stopped, in whatever way, and begun again: the same bytes as in one go, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kimi_lite
from kimi_lite.errors import DoesNotFitError, KimiLiteWarning, UsageError
from kimi_lite.quantize import resume
from kimi_lite.quantize.calibrate import Calibration, Passage
from kimi_lite.quantize.convert import quantize
from kimi_lite.quantize.plan import Output
from kimi_lite.sample import passages

NANO = Path(kimi_lite.__file__).parent / "nano"
Sample = Callable[[], list[Passage]]


def sample(seed: int = 0) -> list[Passage]:
    return [Passage(np.random.default_rng(seed).integers(0, 800, n).tolist()) for n in (40, 25)]


def beside(out: Path) -> list[str]:
    return sorted(path.name.removeprefix(out.name) for path in out.parent.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """In one go."""
    out = tmp_path_factory.mktemp("whole") / "model.gguf"
    quantize(NANO, out, sample=sample)
    assert beside(out) == [""]
    return out.read_bytes()


@pytest.fixture(autouse=True)
def at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", 0.0)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were calibrated."""
    names, pieces = [], Calibration.pieces

    def noted(self: Calibration, output: Output) -> object:
        names.append(output.name)
        return pieces(self, output)

    monkeypatch.setattr(Calibration, "pieces", noted)
    return names


def stop(
    out: Path, tensor: str, error: type[BaseException] = KeyboardInterrupt, made: Sample = sample
) -> None:
    """Stop when that tensor is being written."""

    def progress(name: str, done: int, total: int) -> None:
        if name == tensor:
            raise error("stopped")

    with pytest.raises(error):
        quantize(NANO, out, sample=made, progress=progress)


@pytest.mark.parametrize(
    ("tensor", "first", "error"),
    [
        ("blk.1.ffn_exps.packed", "blk.1.attn_norm.weight", KeyboardInterrupt),
        ("blk.2.attn_norm.weight", "blk.2.attn_norm.weight", DoesNotFitError),
        ("output.weight", "blk.3.attn_norm.weight", MemoryError),
        ("v.blk.0.ln1.weight", "blk.3.attn_norm.weight", KeyboardInterrupt),
    ],
)
def test_the_same_command_goes_on(
    tmp_path: Path, whole: bytes, passed: list[str], tensor: str, first: str, error: type[BaseException]
) -> None:
    out = tmp_path / "model.gguf"
    with pytest.warns(KimiLiteWarning, match="the same command goes on from there"):
        stop(out, tensor, error)
    assert beside(out) == [".calibrating", ".calibrating.state"]
    passed.clear()
    seen: list[tuple[int, int]] = []
    quantize(NANO, out, sample=sample, progress=lambda _, done, total: seen.append((done, total)))
    assert passed[0] == first
    assert out.read_bytes() == whole
    assert beside(out) == [""]
    assert seen == sorted(seen)  # what was there before counts as done
    assert seen[-1][0] == seen[-1][1]


def test_it_may_be_stopped_more_than_once(tmp_path: Path, whole: bytes) -> None:
    out = tmp_path / "model.gguf"
    for tensor in ("blk.1.attn_output.weight", "blk.2.ffn_exps.packed"):
        with pytest.warns(KimiLiteWarning, match="goes on"):
            stop(out, tensor)
    quantize(NANO, out, sample=sample)
    assert out.read_bytes() == whole


def test_in_the_first_minute_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "EVERY", 60.0)
    stop(tmp_path / "model.gguf", "blk.2.ffn_exps.packed")
    assert beside(tmp_path / "model.gguf") == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda state: cut(state), "is damaged or incomplete"),
        (lambda state: state.write_bytes(b"no state at all"), "is damaged or incomplete"),
        (lambda state: flip(state, 40), "is damaged or incomplete"),  # the digest of itself
        (lambda state: flip(state, 64), "is damaged or incomplete"),  # how many tensors there are
        (lambda state: flip(state, 1000), "is damaged or incomplete"),  # the residual stream
        (lambda state: cut(state.with_suffix("")), "is damaged or incomplete"),
        (lambda state: state.with_suffix("").unlink(), "is damaged or incomplete"),
    ],
)
def test_what_is_damaged_begins_anew(
    tmp_path: Path, whole: bytes, harm: Callable[[Path], object], says: str
) -> None:
    out = tmp_path / "model.gguf"
    with pytest.warns(KimiLiteWarning, match="goes on"):
        stop(out, "blk.2.ffn_exps.packed")
    harm(tmp_path / "model.gguf.calibrating.state")
    with pytest.warns(KimiLiteWarning, match=f"{says}; calibrating begins anew"):
        quantize(NANO, out, sample=sample)
    assert out.read_bytes() == whole
    assert beside(out) == [""]


def test_another_sample_or_checkpoint_begins_anew(tmp_path: Path, whole: bytes) -> None:
    out, checkpoint = tmp_path / "model.gguf", tmp_path / "nano"
    shutil.copytree(NANO, checkpoint)
    with pytest.warns(KimiLiteWarning, match="goes on"):
        stop(out, "blk.2.ffn_exps.packed", made=lambda: sample(1))
    anew = "came from another checkpoint, sample or version; calibrating begins anew"
    with pytest.warns(KimiLiteWarning, match=anew), pytest.warns(KimiLiteWarning, match="goes on"):
        stop(out, "blk.2.ffn_exps.packed")
    os.utime(next(checkpoint.glob("*.safetensors")), ns=(0, 0))
    with pytest.warns(KimiLiteWarning, match=anew):
        quantize(checkpoint, out, sample=sample)
    assert out.read_bytes() == whole


def test_a_state_that_cannot_be_written_stops_in_a_sentence_and_the_one_before_stays(
    tmp_path: Path, whole: bytes, passed: list[str]
) -> None:
    out = tmp_path / "model.gguf"

    def progress(name: str, done: int, total: int) -> None:
        if name == "blk.1.attn_output.weight":
            (tmp_path / "model.gguf.calibrating.new").symlink_to("/dev/full")

    with (
        pytest.warns(KimiLiteWarning, match="goes on"),
        pytest.raises(DoesNotFitError, match=r"calibrating.new: cannot be written \(No space left"),
    ):
        quantize(NANO, out, sample=sample, progress=progress)
    assert beside(out) == [".calibrating", ".calibrating.state"]
    passed.clear()
    quantize(NANO, out, sample=sample)
    assert passed[0] == "blk.1.attn_norm.weight"
    assert out.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
def test_two_runs_do_not_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.gguf"
    monkeypatch.setattr(resume, "EVERY", 60.0)

    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another run is writing it; wait for that one"):
            quantize(NANO, out, sample=sample)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(NANO, out, sample=sample, progress=second)
    assert beside(out) == []


WAITS = """
import signal, time
from kimi_lite.__main__ import main
from kimi_lite.quantize import resume
def note(self, writer, noted=resume.Journal.note):
    noted(self, writer)
    if self.state.exists():
        time.sleep(600)  # until the signal comes
resume.EVERY, resume.Journal.note = 0, note
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_goes_on(tmp_path: Path, sent: signal.Signals) -> None:
    text, out = tmp_path / "text.py", tmp_path / "killed.gguf"
    text.write_text(Path(__file__).read_text()[:1500])
    arguments = ["quantize", str(NANO), str(out), "--calibrate", str(text)]
    slow = [sys.executable, "-c", WAITS, *arguments]
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "killed.gguf.calibrating.state").exists():
        assert process.poll() is None and time.monotonic() < until  # noqa: PT018
        time.sleep(0.01)
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1]
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "kimi-lite: warning: stopped; the same command goes on from there" in said
    assert not out.exists()
    subprocess.run([sys.executable, "-m", "kimi_lite", *arguments], check=True, capture_output=True)
    whole = tmp_path / "whole.gguf"
    quantize(NANO, whole, sample=lambda: passages(NANO, [str(text)], tmp_path))
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.gguf", "text.py", "whole.gguf"]
