"""The image side against the float32 reference: from one layer's bits to the whole model's logits.

int8 in groups of 32 rounds by half a step of absmax / 127, and a group whose largest value is `absmax` has an rms of at
least absmax / sqrt(32): the noise of one rounding is at most sqrt(32) / (127 sqrt(12)) = 0.0129 of what it rounds. The step of
activations is a power of two, hence up to twice as large: 0.0257.
A product rounds weights and activations: 0.0288. The 4 L + 2 products on the way (patches stay in float32) round
independently, and norms and residuals do not amplify: rms error <= 0.0288 sqrt(4 L + 2) of the result. A trained tower
keeps to that on pictures of the kind that it was trained on; on others, small differences may decide much. So nano is
shown words and shapes, and the random tower everything.

With float32 weights only attention rounds. Of q, k, v and the weights, v is the coarsest: half a step of absmax / 511
over blocks of 128 keys, hence at most sqrt(128) / (1022 sqrt(3)) = 0.0064 a layer, sqrt(L) of that in all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rewrite import rewritten

from kimi_lite.errors import ModelFileError, UsageError
from kimi_lite.formats.config import ImageConfig
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime import image, kernels, vision
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.reference.image import process
from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.pictures import scene, text_picture
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.reference.vision import patch_angles, position_rows
from kimi_lite.runtime.template import ImagePart, Message, render
from kimi_lite.runtime.vision import EncodedImage, ImageEncoder, encode, open_vision

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano"
SIZES = [(50, 30), (300, 200), (28, 28), (400, 420), (7, 260)]


def products(L: int) -> float:
    return float(0.0288 * np.sqrt(4 * L + 2))


def attention_only(L: int) -> float:
    return float(0.0064 * np.sqrt(L))


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth shades with noise: neighbouring patches are neither equal nor independent."""
    rng = np.random.default_rng((seed, *size))
    y, x = np.mgrid[: size[1], : size[0]]
    shade = 120 + 60 * np.sin(x / 23)[..., None] + 60 * np.cos(y / 17)[..., None] * [1, -1, 0.5]
    return Image.fromarray(np.clip(shade + rng.normal(0, 12, shade.shape), 0, 255).astype(np.uint8))


def known_to(name: str) -> list[Image.Image]:
    if name == "random":
        return [picture(size) for size in SIZES]
    rng = np.random.default_rng(4)
    words = [
        text_picture(word, grid, rng)[0]
        for word, grid in (("harbor", (1, 5)), ("4096", (3, 4)), ("Kiwi", (2, 7)))
    ]
    return [*words, scene("blue", "diamond", 5, (4, 4), rng)[0], scene("red", "circle", 1, (2, 3), rng)[0]]


def canvas(size: tuple[int, int], config: ImageConfig, seed: int = 0) -> NDArray[np.uint8]:
    return canvas_of(picture(size, seed), config)


def canvas_of(shown: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    return image.canvas(shown, *image.plan(shown.size, config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random` and `nano`: checkpoints, and the files that quantize makes of them."""
    out = tmp_path_factory.mktemp("towers")
    write_checkpoint(out / "random")
    (out / "nano").symlink_to(NANO)
    for name in ("random", "nano"):
        for to in ("bf16", "f16", "q8_0"):
            quantize(out / name, out / f"{name}-{to}.gguf", to=to)
    return out


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, KimiVL]:
    return {name: load(folder / name)[0] for name in ("random", "nano")}


@pytest.mark.parametrize("name", ["random", "nano"])
@pytest.mark.parametrize("to", ["bf16", "f16", "q8_0"])
@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_stay_within_rounding(
    folder: Path, references: dict[str, KimiVL], name: str, to: str, packed: bool
) -> None:
    weights = open_vision(folder / f"{name}-{to}-mmproj.gguf", packed=packed)
    shown = known_to(name)
    found = encode(weights, [canvas_of(each, weights.image) for each in shown])
    L = weights.config.n_layers
    eight_bits = packed or to == "q8_0"
    for each, rows_MD in zip(shown, found, strict=True):
        patches_PX, grid = process(each, weights.image)
        with torch.no_grad():
            expected = references[name].encode_images(torch.from_numpy(patches_PX)[None], grid)[0].numpy()
        error = relative(rows_MD, expected)
        assert error < (products(L) if eight_bits else attention_only(L))
        assert error > (0.002 if eight_bits else 1e-6)  # what is said to be rounded is rounded


@pytest.mark.parametrize("mistake", ["rows and columns swapped", "table transposed"])
def test_a_known_mistake_is_far_outside(
    folder: Path, references: dict[str, KimiVL], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    weights = open_vision(folder / "random-bf16-mmproj.gguf", packed=False)
    if mistake == "table transposed":
        turned = np.ascontiguousarray(weights.positions_hwW.transpose(1, 0, 2))
        object.__setattr__(weights, "positions_hwW", turned)
    else:
        right = vision.patch_angles

        def swapped(grid: tuple[int, int], K: int) -> tuple[NDArray[np.float32], ...]:
            odd_first = np.arange(K // 2).reshape(-1, 2)[:, ::-1].reshape(-1)
            return tuple(np.ascontiguousarray(t[:, odd_first]) for t in right(grid, K))

        monkeypatch.setattr(vision, "patch_angles", swapped)
    size = (300, 200)
    patches_PX, grid = process(picture(size), weights.image)
    with torch.no_grad():
        expected = references["random"].encode_images(torch.from_numpy(patches_PX)[None], grid)[0].numpy()
    error = relative(encode(weights, [canvas(size, weights.image)])[0], expected)
    assert error > 5 * attention_only(weights.config.n_layers)


def test_a_picture_gives_the_same_bits_in_any_company_on_any_machine(folder: Path) -> None:
    weights = open_vision(folder / "nano-bf16-mmproj.gguf")
    canvases = [canvas(size, weights.image, seed) for seed, size in enumerate([(700, 500), *SIZES])]
    together = encode(weights, canvases)
    before = kernels.isa()
    try:
        for isa in kernels.usable_isas():
            kernels.use_isa(isa)
            for threads in (1, 3):
                kernels.set_threads(threads)
                alone = [encode(weights, [pixels])[0] for pixels in canvases[1 if isa == "scalar" else 0 :]]
                assert all(np.array_equal(a, b) for a, b in zip(alone[::-1], together[::-1], strict=False))
    finally:
        kernels.use_isa(before)
        kernels.set_threads(None)


def test_calls_cover_all_rows_once_and_begin_at_whole_blocks() -> None:
    sizes = [2000, 4, 16, 480, 600, 4]
    calls = list(vision.calls_of(sizes, vision.ROWS))
    pieces = [piece for call in calls for piece in call]
    assert [p.start for p in pieces] == [0, *[p.stop for p in pieces[:-1]]]
    assert pieces[-1].stop == sum(sizes)
    assert all(p.first % 128 == 0 for p in pieces)
    assert all(0 < call[-1].stop - call[0].start <= vision.ROWS for call in calls)
    assert max(len(call) for call in calls) > 1


@pytest.mark.parametrize("grid", [(2, 2), (16, 16), (10, 22), (46, 6), (3, 120)])
def test_positions_follow_the_published_resize(grid: tuple[int, int]) -> None:
    table = np.random.default_rng(1).standard_normal((16, 16, 8), dtype=np.float32)
    ours = np.concatenate(list(vision.position_rows(table, grid)))
    expected = position_rows(torch.from_numpy(table), grid).numpy()
    # Torch computes source coordinates in float32: off by 2^-24 of 16, on a curve whose slope is at most 4 a step.
    assert np.abs(ours - expected).max() <= 16 * 2**-23 * 4 * np.abs(table).max() * 4
    if grid == (16, 16):
        assert np.array_equal(ours, table.reshape(-1, 8))


def test_angles_turn_even_pairs_by_columns(references: dict[str, KimiVL]) -> None:
    config = references["nano"].config.vision
    assert config is not None
    K = config.hidden_size // config.n_heads
    ours, expected = vision.patch_angles((6, 10), K), patch_angles((6, 10), config).numpy()
    assert np.abs(np.stack(ours) - expected).max() <= 2 * 2.0**-24
    assert np.array_equal(np.arccos(ours[0][:10, 0].astype(np.float64)).round(3)[:4], [0, 1, 2, 3])


def test_the_whole_model_gives_the_references_logits(folder: Path, references: dict[str, KimiVL]) -> None:
    """Two pictures and text between them: our rows through our text model, against the reference from pixel to logit."""
    engine = Engine(folder / "nano-bf16.gguf")
    weights = open_vision(folder / "nano-bf16-mmproj.gguf", packed=False)
    rows = encode(weights, [canvas((100, 60), weights.image), canvas((60, 100), weights.image, 1)])
    pictures = [EncodedImage(len(r), r.astype(np.float16), str(i)) for i, r in enumerate(rows)]
    prompt = render(
        [Message("user", [pictures[0], "and", pictures[1], "What does it say?"])], engine.tokenizer
    )
    ours = engine.prefill(prompt, pictures=pictures)
    model = references["nano"]
    with torch.no_grad():
        theirs = [
            model.encode_images(torch.from_numpy(process(picture(size, seed), weights.image)[0])[None], grid)[
                0
            ]
            for seed, (size, grid) in enumerate([((100, 60), (6, 8)), ((60, 100), (8, 6))])
        ]
        ids = torch.tensor([prompt])
        expected = model(ids, torch.cat(theirs))[0, -1].numpy()
        same_rows = model(
            ids, torch.from_numpy(np.concatenate([p.rows_MD for p in pictures]).astype(np.float32))
        )
    n = engine.n_named
    # With the same rows and float weights only attention's int8 is between the two: the query, the cached row, the row once
    # more and the weights, each at most 0.0129 (see above), in each of 4 layers. Beyond that the tower's own error,
    # which the text model's norms do not amplify.
    text_bound = 0.0129 * float(np.sqrt(4 * 4))
    text_error = relative(ours[:n], same_rows[0, -1].numpy()[:n])
    assert text_error < text_bound
    assert relative(ours[:n], expected[:n]) < text_bound + attention_only(weights.config.n_layers)
    assert int(ours.argmax()) == int(expected.argmax())


def encoder(folder: Path, tmp_path: Path, **arguments: Any) -> ImageEncoder:
    return ImageEncoder(folder / "nano-bf16-mmproj.gguf", 256, ImageCache(tmp_path), **arguments)


def test_two_pictures_of_one_size_do_not_share_a_prefix(folder: Path, tmp_path: Path) -> None:
    see, engine = encoder(folder, tmp_path), Engine(folder / "nano-bf16.gguf")
    first, second = see.encode([picture((90, 40), 1), picture((90, 40), 2)])
    assert first.n_tokens == second.n_tokens

    def ask(seen: EncodedImage, engine: Engine) -> NDArray[np.float32]:
        prompt = render([Message("user", [seen, "What?"])], engine.tokenizer)
        return engine.prefill(prompt, pictures=[seen])

    ask(first, engine)
    head = engine.tokens.index(engine.pad_id)
    other = ask(second, engine)
    assert engine.n_reused == head  # not one image token
    assert np.array_equal(other, ask(second, Engine(folder / "nano-bf16.gguf")))
    again = ask(second, engine)
    assert engine.n_reused == len(engine.tokens) - 1
    assert np.array_equal(again, other)


@pytest.mark.parametrize("n", [0, 2])
def test_places_and_pictures_must_agree(folder: Path, tmp_path: Path, n: int) -> None:
    seen = encoder(folder, tmp_path).encode([picture((30, 30))])
    engine = Engine(folder / "nano-bf16.gguf")
    prompt = render([Message("user", [ImagePart(seen[0].n_tokens), "What?"])], engine.tokenizer)
    with pytest.raises(UsageError, match=f"4 image places for {4 * n} image tokens"):
        engine.prefill(prompt, pictures=seen * n)


def test_a_cap_shrinks_and_a_question_beyond_it_is_refused(folder: Path, tmp_path: Path) -> None:
    see = encoder(folder, tmp_path, max_tokens=30)
    (seen,) = see.encode([picture((400, 420))])
    assert 15 < seen.n_tokens <= 30 < see.n_tokens((400, 420), capped=False)
    with pytest.raises(UsageError, match="0 image tokens"):
        encoder(folder, tmp_path, max_tokens=0)


@pytest.mark.parametrize("max_tokens", [1, 3, 7, 50, 255, 1024, 4000])
def test_a_cap_is_never_exceeded(max_tokens: int) -> None:
    config = ImageConfig(token_limit=16384)
    for size in [(30, 30), (1000, 1000), (1919, 1081), (4000, 3000), (897, 897), (60, 1500)]:
        try:
            _, (h, w) = image.plan(size, config, max_tokens)
        except UsageError as error:
            assert max_tokens < 10
            assert "does not fit" in str(error)  # noqa: PT017
            continue
        assert h * w // 4 <= max_tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, t: m.update({"clip.projector_type": "kimik25"}), "expected an image side of Kimi-VL"),
        (lambda m, t: m.update({"general.architecture": "deepseek2"}), "expected an image side of Kimi-VL"),
        (lambda m, t: m.update({"clip.use_gelu": False}), "use_gelu is False"),
        (lambda m, t: m.update({"clip.vision.attention.layer_norm_epsilon": 1e-6}), "layer_norm_epsilon"),
        (lambda m, t: m.pop("clip.vision.block_count"), "'vision.block_count' is missing"),
        (lambda m, t: m.update({"clip.vision.block_count": 6}), "'v.blk.5.ln1.weight' is missing"),
        (lambda m, t: m.update({"clip.vision.feed_forward_length": 544}), "expected"),
        (lambda m, t: t.pop("mm.2.bias"), "'mm.2.bias' is missing"),
        (lambda m, t: m.update({"clip.vision.image_std": [0.5, 0.0, 0.5]}), "positive"),
    ],
)
def test_another_or_a_damaged_image_side_is_one_sentence(
    folder: Path, tmp_path: Path, change: Any, says: str
) -> None:
    wrong = rewritten(folder / "nano-bf16-mmproj.gguf", tmp_path / "wrong.gguf", change)
    with pytest.raises(ModelFileError, match=says):
        open_vision(wrong)


def test_an_image_side_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="belongs to another model"):
        ImageEncoder(folder / "nano-bf16-mmproj.gguf", 512, ImageCache(tmp_path))


def test_a_file_by_llama_cpp_takes_its_limit_from_the_release(folder: Path, tmp_path: Path) -> None:
    def limit(name: str) -> int:
        def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
            del metadata["kimi_lite.in_token_limit"]
            metadata["general.name"] = name

        wrong = rewritten(folder / "nano-bf16-mmproj.gguf", tmp_path / "foreign.gguf", change)
        return open_vision(wrong).image.token_limit

    assert limit("Kimi VL A3B Thinking 2506") == 16384
    assert limit("Kimi VL A3B Instruct") == 4096
    (tmp_path / "preprocessor_config.json").write_bytes((NANO / "preprocessor_config.json").read_bytes())
    assert limit("Kimi VL A3B Instruct") == 1024


def test_values_beyond_float16_are_said_to_be_damage() -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        vision._rounded(np.array([[np.nan]], np.float32))
    with pytest.raises(ModelFileError, match="damaged"):
        vision._rounded(np.array([[1e6]], np.float32))
