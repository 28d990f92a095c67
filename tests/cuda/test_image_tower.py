"""The image tower's kernels and the whole tower, run thread by thread on the CPU, against the CPU engine: equal bits."""

from pathlib import Path

import numpy as np
import pytest
from card_memory import empty_rows, fetched, get, int8_rows, put
from fake_driver import FakeDriver
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime import _kernels, kernels
from kimi_lite.runtime.cuda import tower
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import DeviceLostError, DeviceMemoryError
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.program import Patches, Rows
from kimi_lite.runtime.cuda.tower import TowerShape, room_for
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.vision import LN_EPS, VisionWeights, encode, open_vision, padded

F32 = NDArray[np.float32]
NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"


def same_rows(card: Card, rows: Rows, expected_TX: F32) -> None:
    """The int8 rows of floats that the CPU computed, padded with zeros."""
    for found, formula in zip(fetched(card, rows, len(expected_TX)), int8_rows(expected_TX), strict=True):
        np.testing.assert_array_equal(found, formula)


def padded_to_groups(rng: np.random.Generator, T: int, W: int) -> tuple[F32, F32]:
    """Random rows, and an array for results that is as wide as whole groups."""
    return (3 + 2 * rng.standard_normal((T, W))).astype(np.float32), np.full(
        (T, padded(W)), np.nan, np.float32
    )


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("W", [72, 192, 1152])
def test_layer_norm_is_the_cpus(card: Card, fake: FakeDriver, W: int, backwards: bool) -> None:
    fake.order(backwards=backwards)
    rng = np.random.default_rng(W)
    x_TW, expected_TX = padded_to_groups(rng, 9, W)
    x_TW[1], x_TW[2, ::3] = 7, -0.0  # no variance; zeros with a sign
    weight, bias = (rng.standard_normal(W, dtype=np.float32) for _ in range(2))
    _kernels.layer_norm(x_TW, weight, bias, LN_EPS, expected_TX)
    rows, out = empty_rows(card, 9, padded(W)), card.allocate(x_TW.nbytes, "a test")
    card.launch(
        "layer_norm", (3,), 128, 0,
        put(card, x_TW), put(card, weight), put(card, bias), 9, W, LN_EPS, 0, out, rows,
    )  # fmt: skip
    np.testing.assert_array_equal(get(card, out, (9, W)).view(np.int32), expected_TX[:, :W].view(np.int32))
    same_rows(card, rows, expected_TX)


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 6), (6, 2)])
def test_layer_norm_brings_squares_of_patches_together(card: Card, h: int, w: int) -> None:
    x_PW, out_PW = padded_to_groups(np.random.default_rng(h), h * w, 32)
    one, zero = np.ones(32, np.float32), np.zeros(32, np.float32)
    squares = x_PW.reshape(h // 2, 2, w // 2, 2, 32).transpose(0, 2, 1, 3, 4).reshape(-1, 32)
    _kernels.layer_norm(np.ascontiguousarray(squares), one, zero, LN_EPS, out_PW)
    out = card.allocate(x_PW.nbytes, "a test")
    card.launch(
        "layer_norm", (-(-h * w // 4),), 128, 0,
        put(card, x_PW), put(card, one), put(card, zero), h * w, 32, LN_EPS, w, out, tower.NO_ROWS,
    )  # fmt: skip
    np.testing.assert_array_equal(get(card, out, (h * w, 32)), out_PW)


@pytest.mark.parametrize("exact", [False, True])
def test_both_gelus_and_the_residual_are_the_cpus(card: Card, exact: bool) -> None:
    F = 4304  # not in whole groups
    values = np.stack([np.linspace(-12, 12, F), np.geomspace(1e-30, 1e3, F), -np.geomspace(1e-30, 1e3, F)])
    y_TF: F32 = (
        np.random.default_rng(2).permuted(values, axis=1).astype(np.float32)
    )  # no group of small ones alone
    bias = np.random.default_rng(0).standard_normal(F).astype(np.float32)
    bias[::3] = 0
    expected_TX = np.full((3, padded(F)), np.nan, np.float32)
    _kernels.gelu(y_TF, bias, exact, expected_TX)
    y, b, rows = put(card, y_TF), put(card, bias), empty_rows(card, 3, padded(F))
    card.launch("gelu_rows", (-(-padded(F) // 128), 3), 128, 0, y, b, F, int(exact), rows)
    same_rows(card, rows, expected_TX)
    card.launch("quantize_rows", (-(-padded(F) // 128), 3), 128, 0, y, F, rows)
    same_rows(card, rows, np.pad(y_TF, ((0, 0), (0, padded(F) - F))))
    x_TF = np.random.default_rng(1).standard_normal((3, F), dtype=np.float32)
    x = put(card, x_TF)
    card.launch("add_bias", (-(-F // 128), 3), 128, 0, y, b, F, x)
    _kernels.add_bias(y_TF, bias, x_TF)
    np.testing.assert_array_equal(get(card, x, (3, F)).view(np.int32), x_TF.view(np.int32))


@pytest.mark.parametrize(("T", "W", "X"), [(1, 72, 608), (19, 33, 32)])
def test_the_patch_projection_is_the_cpus(card: Card, T: int, W: int, X: int) -> None:
    rng = np.random.default_rng(T)
    patches_TX, weight_WX = (rng.standard_normal((n, X), dtype=np.float32) for n in (T, W))
    places_TW, bias = rng.standard_normal((T, W), dtype=np.float32), rng.standard_normal(W, dtype=np.float32)
    x = card.allocate(4 * T * W, "a test")
    card.launch(
        "embed_patches", (-(-W // 8), -(-T // 8)), 128, 0,
        put(card, weight_WX), put(card, patches_TX), X, W, T, put(card, places_TW), put(card, bias), x,
    )  # fmt: skip
    expected_TW = kernels.linear(
        kernels.Matrix("F32", weight_WX.view(np.uint8).reshape(-1), W, X), patches_TX
    )
    _kernels.add_bias(places_TW, bias, expected_TW)
    np.testing.assert_array_equal(get(card, x, (T, W)).view(np.int32), expected_TW.view(np.int32))


class Store:
    """One picture's queries, keys and values on the card, cleared."""

    def __init__(self, card: Card, N: int, H: int, K: int) -> None:
        Np, Kp = -(-N // 128) * 128, -(-K // 16) * 16
        words = [H * N * K // 2, H * Np * K // 2, H * Np * Kp // 2, H * N, H * Np, H * Np // 128 * Kp]
        self.patches = Patches(*(put(card, np.zeros(n, np.uint32)) for n in words), N, H, K, Np, Kp)
        self.card = card

    def place(self, first: int, qkv: F32, bias: F32, cos: F32, sin: F32) -> None:
        self.card.launch(
            "place_patches", (self.patches.H, -(-len(qkv) // 128)), 128, 0,
            self.patches, *(put(self.card, a) for a in (qkv, bias, cos, sin)), first, len(qkv),
        )  # fmt: skip

    def attend(self, first: int, n: int) -> F32:
        H, K = self.patches.H, self.patches.K
        out = self.card.allocate(4 * n * H * K, "a test")
        self.card.launch(
            f"attend_patches_{5 if K <= 80 else 8}", (-(-n // 32), H), 128, 8192, self.patches, first, n, out
        )
        return np.asarray(get(self.card, out, (n, H * K)))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("N", "H", "K", "cut"),
    [
        (4, 1, 36, 4),
        (127, 2, 72, 127),
        (128, 2, 48, 128),
        (300, 2, 72, 128),
        (140, 1, 128, 128),
        (33, 2, 4, 33),
    ],
)
def test_attention_is_the_cpus_however_rows_come(
    card: Card, fake: FakeDriver, N: int, H: int, K: int, cut: int, backwards: bool
) -> None:
    fake.order(backwards=backwards)
    rng = np.random.default_rng(N)
    qkv: F32 = rng.normal(0, 2, (N, 3 * H * K)).astype(np.float32)
    bias = rng.standard_normal(3 * H * K, dtype=np.float32)
    qkv[:, 2 * H * K] *= 20  # one channel of v far larger than the others
    qkv[N // 2] *= 4  # one patch that stands out: weights from 0 to 1
    angle = rng.uniform(0, 6, (N, K // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    store, ours, expected = (
        _kernels.PatchStore(N, H, K),
        Store(card, N, H, K),
        np.empty((N, H * K), np.float32),
    )
    store.place(0, qkv, bias, cos, sin)
    store.attend(0, expected)
    for at in range(0, N, cut):
        ours.place(at, qkv[at : at + cut], bias, cos[at : at + cut], sin[at : at + cut])
    found = np.concatenate([ours.attend(at, min(cut, N - at)) for at in range(0, N, cut)])
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


# ---- the whole tower


def canvas(seed: int, h: int, w: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (14 * h, 14 * w, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionWeights]:
    """Nano's tower as its packed file holds it, and a random one of odd widths from an mmproj file."""
    out = tmp_path_factory.mktemp("towers")
    write_checkpoint(out / "random")
    quantize(out / "random", out / "random.gguf", to="f16")
    return {"nano": open_vision(GgufFile(NANO)), "random": open_vision(out / "random-mmproj.gguf")}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["nano", "random"])
def test_pictures_together_have_the_cpus_bits_and_memory_comes_back(
    fake: FakeDriver, sides: dict[str, VisionWeights], name: str, kept: bool
) -> None:
    weights, device = sides[name], CudaDevice(fake.path)
    shape = TowerShape.of(weights.config, weights.text_width)
    pictures = [canvas(1, 2, 2), canvas(2, 10, 14), canvas(3, 4, 6)]
    if kept:
        device.keep_tower(weights)
        assert fake.used() == shape.bytes
    before, said = fake.used(), list[float]()
    needed = room_for(shape, [4, 140, 24], resident=kept)
    fake.machine(memory=before + needed)  # not a byte more
    found = device.encode(weights, pictures, said.append)
    for ours, theirs in zip(found, encode(weights, pictures), strict=True):
        np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))
    assert said == [(i + 1) / shape.L for i in range(shape.L)]
    assert fake.used() == before
    device.close()
    assert fake.used() == 0


def test_a_picture_of_several_pieces_has_the_cpus_bits(
    fake: FakeDriver, sides: dict[str, VisionWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "MOST_ROWS", 128)  # as many rows as two of this picture's, and more
    weights, device = sides["random"], CudaDevice(fake.path)
    picture = canvas(4, 8, 50)
    np.testing.assert_array_equal(device.encode(weights, [picture])[0], encode(weights, [picture])[0])
    device.close()


# ---- bad days


def test_a_picture_without_room_leaves_nothing_behind(
    fake: FakeDriver, sides: dict[str, VisionWeights]
) -> None:
    weights = sides["nano"]
    shape = TowerShape.of(weights.config, weights.text_width)
    fake.machine(memory=room_for(shape, [140], resident=False) - 1)
    device = CudaDevice(fake.path)
    with pytest.raises(DeviceMemoryError, match=r"encoding pictures of 140 patches takes \d.* are free"):
        device.encode(weights, [canvas(1, 10, 14)])
    fake.machine(memory=shape.bytes - 1)
    with pytest.raises(DeviceMemoryError, match="the image tower takes"):
        device.keep_tower(weights)
    assert fake.used() == 0
    device.close()


def test_a_launch_that_fails_is_a_lost_card(fake: FakeDriver, sides: dict[str, VisionWeights]) -> None:
    device = CudaDevice(fake.path)
    fake.fail("cuLaunchKernel", 1, after=20)
    with pytest.raises(DeviceLostError, match="failed"):
        device.encode(sides["nano"], [canvas(1, 4, 4)])
    device.close()
    assert fake.used() == 0


def test_a_tower_in_floats_is_refused(fake: FakeDriver, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "random")
    quantize(tmp_path / "random", tmp_path / "random.gguf", to="f16")
    weights, device = open_vision(tmp_path / "random-mmproj.gguf", packed=False), CudaDevice(fake.path)
    with pytest.raises(UsageError, match=r"^the image tower's qkv has the layout F32, .*only for q8g32$"):
        device.encode(weights, [canvas(1, 2, 2)])
    device.close()
    assert fake.used() == 0
