"""The halves of a layer on a driver without a card, at odd shapes, against the CPU engine: equal bits."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from fake_driver import FakeDriver
from numpy.typing import NDArray
from random_matrix import packed

from kimi_lite.errors import UsageError
from kimi_lite.formats.packed import join_mlp, mlp_bytes
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cuda import halves
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import MANY
from kimi_lite.runtime.cuda.halves import Shape
from kimi_lite.runtime.kernels import AttentionLayer, FeedForwardLayer, Float, Matrix, Mlp, Router
from kimi_lite.runtime.weights import Layer

# One chunk and a bit of D, one head more than a tile, half a group of rope; a latent and a down of two chunks.
SHAPES = {
    "odd": Shape(D=288, H=9, N=32, R=16, C=64, V=32, F=32, shared_F=96, E=5, A=2),
    "wide": Shape(D=64, H=3, N=64, R=32, C=288, V=64, F=288, shared_F=576, E=11, A=4),
}


def matrix(rng: np.random.Generator, layout: str, O: int, I: int, count: int = 1) -> Matrix:
    spread = 0.02 if layout == "q8g32" else 0.3
    return packed(rng, layout, O, I, count, spread / np.sqrt(I))


def mlp(rng: np.random.Generator, layout: str, F: int, D: int, count: int = 1) -> Mlp:
    runs = []
    for _ in range(count):
        gate, up, down = (matrix(rng, layout, *shape).data for shape in ((F, D), (F, D), (D, F)))
        runs.append(join_mlp(gate, up, down, layout, D))
    return Mlp(F, D, count, layout, np.concatenate(runs))


def stacked(rng: np.random.Generator, layout: str, F: int, D: int, count: int = 1) -> Mlp:
    """An MLP as three matrices, which is what a standard GGUF gives."""
    parts = (matrix(rng, layout, *shape, count) for shape in ((F, D), (F, D), (D, F)))
    gate, up, down = parts
    return Mlp(F, D, count, matrices=(gate, up, down))


def vector(rng: np.random.Generator, *shape: int) -> Float:
    return rng.standard_normal(shape, dtype=np.float32)


def layer(
    seed: int, s: Shape, *, dense: bool = False, layout: str = "q4b32", standard: bool = False
) -> Layer:
    rng = np.random.default_rng(seed)
    attention = AttentionLayer(
        norm_D=vector(rng, s.D),
        q=matrix(rng, layout, s.H * (s.N + s.R), s.D),
        kv_a=matrix(rng, "q8g32", s.C + s.R, s.D),
        kv_norm_C=vector(rng, s.C),
        k_b=matrix(rng, "q8g32", s.C, s.N, s.H),
        v_b=matrix(rng, "q8g32", s.V, s.C, s.H),
        o=matrix(rng, layout, s.D, s.H * s.V),
        eps=1e-5,
        kv_eps=1e-6,
        scale=(s.N + s.R) ** -0.5,
    )
    make = stacked if standard else mlp
    shared = make(rng, layout, s.shared_F, s.D)
    if dense:
        return Layer(attention, FeedForwardLayer(vector(rng, s.D), 1e-5, shared))
    router = Router(vector(rng, s.E, s.D), rng.normal(0, 0.1, s.E).astype(np.float32), s.A, 2.446)
    return Layer(
        attention, FeedForwardLayer(vector(rng, s.D), 1e-5, shared, make(rng, layout, s.F, s.D, s.E), router)
    )


class Pair:
    """The same layer on the CPU engine and on the card."""

    def __init__(
        self,
        fake: FakeDriver,
        shape: Shape,
        layer: Layer,
        experts: Sequence[int] | None = None,
        context: int = 700,
    ) -> None:
        self.shape, self.layer = shape, layer
        self.device = CudaDevice(fake.path)
        self.device.load_layer(0, layer, experts)
        self.device.reserve_cache(context, streams=False)
        sizes = kernels.latent_cache_bytes(context, shape.C, shape.R)
        self.rows, self.columns = (np.zeros(n, np.uint8) for n in sizes)
        self.cache = kernels.latent_cache(self.rows, self.columns, context, shape.C, shape.R)
        self.x_TD = np.empty((0, shape.D), np.float32)

    def begin(self, seed: int, T: int, start: int) -> None:
        rng = np.random.default_rng(seed)
        self.x_TD, self.start = vector(rng, T, self.shape.D), start
        angle_TR = rng.uniform(0, 6, (T, self.shape.R // 2))
        self.cos_TR, self.sin_TR = np.cos(angle_TR).astype(np.float32), np.sin(angle_TR).astype(np.float32)
        self.device.begin(self.x_TD, self.cos_TR, self.sin_TR, start)

    def attend(self) -> None:
        self.device.attend(0)
        kernels.attend(self.layer.attention, self.x_TD, self.cos_TR, self.sin_TR, self.cache, self.start)

    def assert_equal(self) -> None:
        np.testing.assert_array_equal(self.device.residual().view(np.int32), self.x_TD.view(np.int32))


@pytest.fixture
def devices(fake: FakeDriver) -> Iterator[list[Pair]]:
    opened = list[Pair]()
    yield opened
    for pair in opened:
        pair.device.close()
    assert fake.used() == 0


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_has_the_cpus_bits_at_every_cut(
    fake: FakeDriver, devices: list[Pair], name: str, backwards: bool
) -> None:
    fake.order(backwards=backwards)
    pair = Pair(fake, SHAPES[name], layer(1, SHAPES[name]))
    devices.append(pair)
    start = 0
    # Whole groups of 32 complete at a step's end, inside it and one token late.
    for seed, T in enumerate([1, 3, 8, 20, 1, 33, 1, MANY + 6, 1]):
        pair.begin(seed, T, start)
        pair.attend()
        pair.assert_equal()
        start += T


@pytest.mark.parametrize(
    ("enough", "room"),
    [(0, halves.SLICE_BYTES), (0, 1), (halves.ENOUGH_BLOCKS, 1)],
    ids=["whole sums", "whole sums in slices", "chunks in slices"],
)
def test_attention_over_several_chunks_of_positions_and_after_going_back(
    fake: FakeDriver, devices: list[Pair], monkeypatch: pytest.MonkeyPatch, enough: int, room: int
) -> None:
    # With 0, a tile adds up all chunks itself, as it does where there are tiles enough for a card; with little room, only
    # some of a step's tokens attend at once.
    monkeypatch.setattr("kimi_lite.runtime.cuda.halves.ENOUGH_BLOCKS", enough)
    monkeypatch.setattr("kimi_lite.runtime.cuda.halves.SLICE_BYTES", room)
    s = Shape(D=32, H=2, N=32, R=16, C=32, V=32, F=32, shared_F=32, E=2, A=1)
    pair = Pair(fake, s, layer(2, s))
    devices.append(pair)
    for seed, (start, T) in enumerate([(0, 256), (256, 250), (506, 1), (300, 9), (309, 1)]):
        pair.device.rewind(start)
        n_launched = fake.calls("cuLaunchKernel")
        pair.begin(seed, T, start)
        pair.attend()
        pair.assert_equal()
        if T >= MANY:  # beside them, six kernels: norm, q and kv_a, latents, k_b, v_b, o
            n_slices, rest = divmod(fake.calls("cuLaunchKernel") - n_launched - 6, 4)
            assert rest == 0
            assert (n_slices > 1) == (room == 1)


def test_steps_that_nobody_waits_for_do_not_overwrite_each_other(
    fake: FakeDriver, devices: list[Pair]
) -> None:
    # The driver below runs nothing before it is waited for; what a step was given must still be there then.
    pair = Pair(fake, SHAPES["odd"], layer(8, SHAPES["odd"]))
    devices.append(pair)
    for seed, (start, T) in enumerate([(0, 9), (9, 3), (12, 1), (13, 1)]):
        pair.begin(seed, T, start)
        pair.attend()
    pair.assert_equal()


@pytest.mark.parametrize("backwards", [False, True])
def test_attention_far_into_a_context(fake: FakeDriver, devices: list[Pair], backwards: bool) -> None:
    # The softmax takes 2048 positions a round, and two buffers in turn; a cache so long is filled by the CPU alone.
    fake.order(backwards=backwards)
    s, start = Shape(D=32, H=2, N=32, R=32, C=32, V=32, F=32, shared_F=32, E=2, A=1), 4200
    pair = Pair(fake, s, layer(7, s), context=start + 4 + MANY)
    devices.append(pair)
    kernels.remember(pair.cache, vector(np.random.default_rng(7), start, s.C + s.R), 0)
    card, there = pair.device._card, pair.device._layers[0].cache
    card.upload(there.rows, pair.rows)
    card.upload(there.columns, pair.columns)
    card.synchronize()
    for T in (1, 3, MANY):
        pair.begin(T, T, start)
        pair.attend()
        pair.assert_equal()
        start += T


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("T", [1, 3, 8, 33, MANY, MANY + 33])
@pytest.mark.parametrize("name", SHAPES)
def test_all_experts_here_have_the_cpus_bits(
    fake: FakeDriver, devices: list[Pair], name: str, T: int, backwards: bool
) -> None:
    fake.order(backwards=backwards)
    pair = Pair(fake, SHAPES[name], layer(3, SHAPES[name]))
    devices.append(pair)
    pair.begin(T, T, 0)
    assert pair.device.route(0, wanted=False) is None
    pair.device.run_experts(0)
    pair.device.add_experts(0, None)
    kernels.feed_forward(pair.layer.feed_forward, pair.x_TD)
    pair.assert_equal()


@pytest.mark.parity
@pytest.mark.parametrize("dense", [False, True])
def test_a_layer_of_kimi_vl_a3b_keeps_the_bits_and_a_cards_limits(
    fake: FakeDriver, devices: list[Pair], dense: bool
) -> None:
    # All widths are the published model's; of 64 experts eight. The driver refuses more than 48 kB of shared memory.
    width = 11264 if dense else 2816
    s = Shape(D=2048, H=16, N=128, R=64, C=512, V=128, F=1408, shared_F=width, E=8, A=6)
    pair, start = Pair(fake, s, layer(9, s, dense=dense), context=80), 0
    devices.append(pair)
    for T in (9, 1, MANY + 1):
        pair.begin(T, T, start)
        pair.attend()
        pair.device.route(0, wanted=False)
        pair.device.run_experts(0)
        pair.device.add_experts(0, None)
        kernels.feed_forward(pair.layer.feed_forward, pair.x_TD)
        pair.assert_equal()
        start += T


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("T", [1, 9, MANY + 1])
def test_dense_layers_and_experts_of_a_standard_file(
    fake: FakeDriver, devices: list[Pair], layout: str, dense: bool, T: int
) -> None:
    s = SHAPES["odd"]
    pair = Pair(fake, s, layer(4, s, dense=dense, layout=layout, standard=True))
    devices.append(pair)
    pair.begin(T, T, 0)
    routed = pair.device.route(0, wanted=dense)
    if dense:
        assert routed is not None
        assert routed.ids_TA.shape == (T, 0)
    pair.device.run_experts(0)
    pair.device.add_experts(0, None)
    kernels.feed_forward(pair.layer.feed_forward, pair.x_TD)
    pair.assert_equal()


@pytest.mark.parametrize("T", [1, 3, 8, MANY + 2])
@pytest.mark.parametrize("experts", [(), (0, 3, 4, 10), tuple(range(10))])
def test_experts_that_the_cpu_ran_are_added_in_their_place(
    fake: FakeDriver, devices: list[Pair], experts: tuple[int, ...], T: int
) -> None:
    s = SHAPES["wide"]
    pair = Pair(fake, s, layer(5, s), experts)
    devices.append(pair)
    pair.begin(T, T, 0)
    routed = pair.device.route(0, wanted=True)
    assert routed is not None
    pair.device.run_experts(0)
    f = pair.layer.feed_forward
    assert f.router is not None
    assert f.routed is not None
    h_TD = kernels.rms_norm(pair.x_TD, f.norm_D, f.eps)
    ids_TA, weights_TA = kernels.route(h_TD, f.router.weight_ED, f.router.bias_E, s.A, f.router.scale)
    np.testing.assert_array_equal(routed.h_TD, h_TD)
    np.testing.assert_array_equal(routed.ids_TA, ids_TA)
    np.testing.assert_array_equal(routed.weights_TA, weights_TA)
    missing = [(t, e) for t in range(T) for e in ids_TA[t] if e not in experts]
    outputs_MD = [alone(f.routed, e, h_TD[t]) for t, e in missing]
    pair.device.add_experts(0, np.stack(outputs_MD) if outputs_MD else None)
    kernels.feed_forward(f, pair.x_TD)
    pair.assert_equal()


def alone(routed: Mlp, expert: int, h_D: Float) -> Float:
    """One expert's output on the CPU, float32 [D]: a mixture of it with weight one, and of a shared MLP of zeros."""
    ids_TA, weights_TA = np.array([[expert]], np.int32), np.ones((1, 1), np.float32)
    nothing = Mlp(32, routed.D, 1, "q4g32", np.zeros(mlp_bytes("q4g32", 32, routed.D), np.uint8))
    return np.asarray(kernels.mixture(routed, nothing, h_D[None], ids_TA, weights_TA)[0])


@pytest.mark.parametrize("name", ["q", "k_b", "shared"])
def test_a_layout_without_gpu_kernels_is_refused_in_one_sentence(
    fake: FakeDriver, devices: list[Pair], name: str
) -> None:
    s = SHAPES["odd"]
    whole = layer(6, s)
    other: NDArray[np.uint8] = np.zeros(1, np.uint8)
    a, f = vars(whole.attention).copy(), vars(whole.feed_forward).copy()
    if name == "shared":
        f["shared"] = Mlp(32, s.D, 1, "q6k", other)
    else:
        a[name] = Matrix("q6k", other, 32, 32)
    device = CudaDevice(fake.path)
    with pytest.raises(
        UsageError,
        match=r"^layer 7, .*the layout q6k has no GPU kernel.*kimi-lite quantize CHECKPOINT model.gguf$",
    ):
        device.load_layer(7, Layer(AttentionLayer(**a), FeedForwardLayer(**f)), None)
    device.close()
    assert fake.used() == 0
