"""A picture is read once: what the latent cache held behind it is found again, and no damage to it does harm."""

import hashlib
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kimi_lite
from kimi_lite.api import Answer, nano_path
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime import kernels, prefix_cache
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.prefix_cache import HEAD, PrefixCache, Span
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.vision import EncodedImage, Place
from kimi_lite.runtime.weights import open_weights

ASKED = "What does it say?"


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (84, 140, 3), np.uint8)
    return Image.fromarray(noise)


def ask(
    question: str, *seeds: int, system: str | None = None, path: Path | None = None
) -> tuple[Answer, Engine]:
    """As a new process would."""
    model = kimi_lite.load(path, vram=0)
    answer = model.ask(question, images=[picture(seed) for seed in seeds], system=system, max_tokens=24)
    assert isinstance(model.engine, Engine)
    return answer, model.engine


def image(n: int) -> EncodedImage:
    return EncodedImage(n, np.random.default_rng(n).standard_normal((n, 256)).astype(np.float16), f"of {n}")


def prompt(engine: Engine, n: int) -> list[int]:
    """Ten tokens, a picture of 50, and the rest."""
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 500, n)]
    return [*ids[:10], *[engine.pad_id] * 50, *ids[60:]]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ends(engine: Engine) -> list[int]:
    """Where the pictures of what the engine holds end."""
    found = [i + 1 for i, place in enumerate(engine.places) if place is not None]
    return [i for i in found if i not in [j - 1 for j in found]]


def test_a_new_process_reads_only_the_question(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, engine = ask(ASKED, 1)
    assert first.stats.reused == 0
    again, _ = ask(ASKED, 1)
    other, _ = ask("Which colour is it?", 1)
    (end,) = ends(engine)
    assert end > 10
    assert again.stats.reused == other.stats.reused == end
    assert (again.text, again.thinking) == (first.text, first.thinking)
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")
    fresh, _ = ask("Which colour is it?", 1)
    assert fresh.stats.reused == 0
    assert (other.text, other.thinking) == (fresh.text, fresh.thinking)
    assert len(list(directory.glob("*.latents"))) == 1


def test_what_is_found_has_the_bits_of_what_was_computed(files: dict[str, Path], directory: Path) -> None:
    computed, found = Engine(files["a"]), Engine(files["a"])
    ids = prompt(computed, 75)
    logits_V = computed.prefill(ids, pictures=[image(50)])
    computed.answered()
    assert np.array_equal(found.prefill(ids, pictures=[image(50)]), logits_V)
    assert (computed.n_reused, found.n_reused) == (0, 60)
    again = Engine(files["a"])  # the question ends with the picture, whose last token must be run
    again.prefill(ids[:60], pictures=[image(50)])
    assert again.n_reused == 0
    # and all that is cached is the same: rows, columns, and those of a group that the question completes
    rest = [5] * 40
    assert np.array_equal(found.append(rest), computed.append(rest))
    found.prefill([*ids, *rest, 6], pictures=[image(50)])
    assert found.n_reused == 115  # what is in memory goes further than what is on the disk


def test_nothing_of_another_prompt_picture_or_model_is_taken(files: dict[str, Path]) -> None:
    ask(ASKED, 1)
    assert ask(ASKED, 2)[0].stats.reused == 0
    assert ask(ASKED, 1, system="Be brief.")[0].stats.reused == 0
    for name, reused in (("a", 0), ("a", 60), ("b", 0)):
        engine = Engine(files[name])
        engine.prefill(prompt(engine, 75), pictures=[image(50)])
        engine.answered()
        assert engine.n_reused == reused, name
    engine, image_50 = Engine(files["a"]), image(50)
    ids = prompt(engine, 75)
    engine.prefill([ids[0] + 1, *ids[1:]], pictures=[image_50])
    assert engine.n_reused == 0


def test_of_two_pictures_the_first_may_be_known_and_the_second_new() -> None:
    _, engine = ask(ASKED, 1, 2)
    first, second = ends(engine)
    assert ask(ASKED, 1, 2)[0].stats.reused == second
    assert ask(ASKED, 1, 3)[0].stats.reused == first
    assert ask(ASKED, 1)[0].stats.reused == first
    assert ask(ASKED, 2, 1)[0].stats.reused == 0


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "empty", "longer", "other version", "head only", "short", "gone"]
)
def test_a_damaged_entry_costs_a_prefill_and_nothing_else(directory: Path, damage: str) -> None:
    expected, _ = ask(ASKED, 1)
    (path,) = directory.glob("*.latents")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    elif damage == "other version":
        data[7:8] = b"2"
    cuts: dict[str, bytes | bytearray] = {
        "cut": data[:-8],
        "empty": b"",
        "longer": data + b"xx",
        "head only": data[: HEAD.size],
    }
    path.write_bytes(cuts.get(damage, data))
    if damage == "short":  # but true to its digest
        body = data[HEAD.size : -8]
        path.write_bytes(data[: HEAD.size - 32] + hashlib.sha256(body).digest() + body)
    if damage == "gone":
        path.unlink()
    again, _ = ask(ASKED, 1)
    assert again.stats.reused == 0
    assert (again.text, again.thinking) == (expected.text, expected.thinking)


def test_a_damaged_entry_leaves_what_the_cache_holds(files: dict[str, Path], directory: Path) -> None:
    engine = Engine(files["a"])
    ids = prompt(engine, 75)
    engine.prefill(ids, pictures=[image(50)])
    engine.answered()
    (path,) = directory.glob("*.latents")
    data = bytearray(path.read_bytes())
    data[HEAD.size :] = bytes(reversed(data[HEAD.size :]))
    path.write_bytes(data)
    engine.rewind(40)  # in the middle of the picture
    changed = [*ids[:62], *[9] * 10]
    logits_V = engine.prefill(changed, pictures=[image(50)])
    assert engine.n_reused == 40
    directory.joinpath(path.name).unlink()
    assert np.array_equal(logits_V, Engine(files["a"]).prefill(changed, pictures=[image(50)]))


def test_the_disk_is_bounded_private_and_the_least_recently_used_go(directory: Path) -> None:
    import os

    engine = Engine(nano_path(), context=200)
    ids = [7] * 100
    engine.append(ids)
    assert isinstance(engine.model, CpuModel)
    cache = engine.model.cache
    one = sum(rows.size for rows in cache.rows(0, 100)) + HEAD.size
    kept = PrefixCache(GgufFile(nano_path()).map, directory, disk_bytes=3 * one)
    spans: list[Span] = []
    for age in range(4):
        if age == 3:  # the first is used now
            assert kept.restore(spans[0], cache)
        (span,) = kept.spans([age, *ids[1:]], [(image(100), i) for i in range(100)])
        kept.keep(span, cache)
        spans.append(span)
        if age < 3:
            os.utime(directory / f"{span.key}.latents", (1000 + age, 1000 + age))
    assert {path.stem for path in directory.iterdir()} == {spans[i].key for i in (0, 2, 3)}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    small = PrefixCache(GgufFile(nano_path()).map, directory / "small", disk_bytes=one // 2)
    small.keep(span, cache)
    assert not (directory / "small").exists()


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", str(tmp_path / "file" / "below"))
    first, _ = ask(ASKED, 1)
    again, _ = ask(ASKED, 1)
    assert (again.text, again.stats.reused) == (first.text, 0)


def test_a_model_file_that_was_moved_away_is_still_known(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(nano_path().read_bytes())
    model = kimi_lite.load(path, vram=0)
    path.unlink()
    assert model.ask(ASKED, images=[picture(1)], max_tokens=24).stats.reused == 0
    assert ask(ASKED, 1)[0].stats.reused > 0  # the same bytes elsewhere


def test_a_picture_that_was_cut_off_is_no_span(tmp_path: Path) -> None:
    kept = PrefixCache(GgufFile(nano_path()).map, tmp_path)
    places: list[Place] = [None, *((image(10), i) for i in range(10)), None]
    assert [(span.first, span.end) for span in kept.spans(range(12), places)] == [(0, 11)]
    assert list(kept.spans(range(10), places[:10])) == []
    assert list(kept.spans([1, 2, 3], [None] * 3)) == []


def test_a_new_version_reads_no_old_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(ASKED, 1)
    monkeypatch.setattr(prefix_cache, "RESULT_VERSION", 999)
    assert ask(ASKED, 1)[0].stats.reused == 0


@pytest.mark.parametrize(("first", "end"), [(0, 64), (0, 70), (33, 96), (5, 31), (64, 64)])
def test_columns_are_made_from_rows(files: dict[str, Path], first: int, end: int) -> None:
    weights = open_weights(files["a"])
    c, rng = weights.config, np.random.default_rng(1)
    whole, copied = LatentCache(c, 100), LatentCache(c, 100)
    rows_TX = rng.standard_normal((100, c.kv_rank + c.rope_dim), np.float32)
    kernels.remember(whole.layers[0], rows_TX, 0)
    kernels.remember(copied.layers[0], rows_TX[:first], 0)
    for to, rows in zip(copied.rows(first, end), whole.rows(first, end), strict=True):
        to[:] = rows
    copied.adopt(first, end)
    assert copied.n == end
    if end == 0:
        return
    q_THC, qr_THR = (
        rng.standard_normal((1, 2, c.kv_rank), np.float32),
        np.ones((1, 2, c.rope_dim), np.float32),
    )
    ours, theirs = (
        kernels.latent_attention(cache.layers[0], q_THC, qr_THR, end - 1, 0.1) for cache in (copied, whole)
    )
    assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    out: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        checkpoint = write_checkpoint(folder / name, vision=None, seed=seed)
        quantize(checkpoint, out.setdefault(name, folder / f"{name}.gguf"), to="int4")
    return out
