"""Encoded pictures are found again, in memory and on disk, and no damage to the cache does harm."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kimi_lite.formats.gguf_file import mmproj_beside
from kimi_lite.runtime import vision
from kimi_lite.runtime.image_cache import HEAD, ImageCache, Rows, default_directory
from kimi_lite.runtime.vision import ImageEncoder

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
MMPROJ = mmproj_beside(NANO) if mmproj_beside(NANO).exists() else NANO


def rows(seed: int, n: int = 10) -> Rows:
    return np.random.default_rng(seed).standard_normal((n, 32)).astype(np.float16)


def test_a_new_process_finds_the_same_bits(tmp_path: Path) -> None:
    ImageCache(tmp_path / "c").put("a", rows(1))
    found = ImageCache(tmp_path / "c").get("a")
    assert found is not None
    assert np.array_equal(found, rows(1))
    assert ImageCache(tmp_path / "c").get("b") is None


def test_directory_and_files_are_private(tmp_path: Path) -> None:
    ImageCache(tmp_path / "c").put("a", rows(1))
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    assert [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "c").iterdir()] == [0o600]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer", "other version", "header only"])
def test_a_damaged_entry_counts_as_absent(tmp_path: Path, damage: str) -> None:
    ImageCache(tmp_path).put("a", rows(1))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    elif damage == "other version":
        data[7:8] = b"2"
    cuts = {"cut": data[:-8], "empty": bytearray(), "longer": data + b"xx", "header only": data[: HEAD.size]}
    path.write_bytes(cuts.get(damage, data))
    assert ImageCache(tmp_path).get("a") is None


def test_the_disk_is_bounded_and_the_least_recently_used_go(tmp_path: Path) -> None:
    size = rows(0).nbytes + HEAD.size
    cache = ImageCache(tmp_path, disk_bytes=3 * size)
    import os

    for age, key in enumerate("abc"):
        cache.put(key, rows(age))
        os.utime(tmp_path / f"{key}.rows", (1000 + age, 1000 + age))
    assert ImageCache(tmp_path).get("a") is not None  # used now
    cache.put("d", rows(9))
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["a", "c", "d"]


def test_memory_is_bounded_but_keeps_the_newest(tmp_path: Path) -> None:
    cache = ImageCache(None, memory_bytes=2 * rows(0).nbytes)
    for key in "abc":
        cache.put(key, rows(1))
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("huge", rows(1, 1000))
    assert cache.get("huge") is not None


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    cache = ImageCache(blocked / "below")
    cache.put("a", rows(1))
    assert cache.get("a") is not None
    assert ImageCache(blocked / "below").get("a") is None


def test_the_environment_names_another_directory_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")
    assert default_directory() is None
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "/somewhere")
    assert default_directory() == Path("/somewhere")
    monkeypatch.delenv("KIMI_LITE_IMAGE_CACHE")
    found = default_directory()
    assert found is not None
    assert found.parts[-2:] == ("kimi-lite", "images")


def test_a_known_picture_encodes_nothing_and_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    first = ImageEncoder(MMPROJ, 256, ImageCache(tmp_path))
    (fresh,) = first.encode([picture])
    assert first.n_encoded == 1
    again = ImageEncoder(MMPROJ, 256, ImageCache(tmp_path))  # as a new process would
    monkeypatch.setattr(vision, "open_vision", lambda path: pytest.fail("the weights were read"))
    (known,) = again.encode([picture])
    assert again.n_encoded == 0
    assert np.array_equal(fresh.rows_MD, known.rows_MD)
    assert fresh.digest == known.digest


def test_what_changes_the_rows_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    cache = ImageCache(tmp_path)

    def key(encoder: ImageEncoder, picture: Image.Image = picture) -> str:
        return encoder.encode([picture])[0].digest

    plain = ImageEncoder(MMPROJ, 256, cache)
    keys = {key(plain), key(ImageEncoder(MMPROJ, 256, cache, max_tokens=4))}
    keys.add(key(plain, picture.rotate(180)))
    keys.add(key(plain, picture.crop((0, 0, 89, 60))))
    monkeypatch.setattr(vision, "RESULT_VERSION", 999)
    keys.add(key(plain))
    other = ImageEncoder(MMPROJ, 256, cache)
    other.identity = "another file"
    keys.add(key(other))
    assert len(keys) == 6
    # The same picture twice in one question is encoded once.
    before = plain.n_encoded
    flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    a, b = plain.encode([flipped, flipped])
    assert a.digest == b.digest
    assert plain.n_encoded == before + 1


def test_many_pictures_are_encoded_in_batches_and_progress_runs_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "BATCH_ROWS", 40)  # patches
    pictures = [Image.effect_noise((28 * (1 + i % 3), 56), 80).convert("RGB") for i in range(9)]
    sizes = []
    real = vision.encode

    def counted(weights: vision.VisionWeights, canvases: list[Any], on_progress: vision.Progress) -> Any:
        sizes.append(len(canvases))
        return real(weights, canvases, on_progress)

    monkeypatch.setattr(vision, "encode", counted)
    shares: list[float] = []
    encoder = ImageEncoder(MMPROJ, 256, ImageCache(None, memory_bytes=1))
    rows = encoder.encode(pictures, shares.append)
    assert sum(sizes) == 9
    assert 3 < len(sizes) < 9  # 8, 16 or 24 patches each, 40 at most together
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    monkeypatch.undo()
    together = ImageEncoder(MMPROJ, 256, ImageCache(None)).encode(pictures)
    assert all(np.array_equal(a.rows_MD, b.rows_MD) for a, b in zip(rows, together, strict=True))
