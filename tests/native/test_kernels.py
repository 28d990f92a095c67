"""Every kernel on every instruction set, against formulas written out here."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_model import cached, int8_groups, turned, two_digits, unpack
from random_matrix import every_byte, packed, random_blocks
from tolerance import U32, gamma

from kimi_lite.formats.packed import LAYOUTS, pack_quantized
from kimi_lite.runtime import _kernels, kernels
from kimi_lite.runtime.kernels import Matrix, Mlp

F32 = NDArray[np.float32]
GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(params=kernels.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.use_isa(request.param)
    assert kernels.isa() == request.param
    yield request.param
    kernels.use_isa(before)


def bound(w_OI: NDArray[Any], x_TI: NDArray[Any]) -> NDArray[Any]:
    """Roundings of one row: the fused step of each group, 8 in a chunk, then the chunks. Scales of activations are powers of two."""
    groups = w_OI.shape[1] // 32
    return np.asarray(gamma(min(8, groups) + groups // 8 + 1) * (np.abs(x_TI) @ np.abs(w_OI).T) + 1e-30)


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
@pytest.mark.parametrize(("O", "I"), [(16, 32), (17, 64), (45, 288), (96, 1408)])
@pytest.mark.parametrize("T", [1, 2, 3, 6, 7, 8, 13, 27])
def test_packed_products_follow_the_formula(isa: str, layout: str, O: int, I: int, T: int) -> None:
    rng = np.random.default_rng(O * I + T)
    matrix = packed(rng, layout, O, I)
    x_TI = rng.standard_normal((T, I), dtype=np.float32)
    x_TI[0, :32] = 0
    w_OI = unpack(matrix.data, layout, O, I)
    rounded = np.stack([int8_groups(x.astype(np.float64)) for x in x_TI])
    error = np.abs(kernels.linear(matrix, x_TI) - rounded @ w_OI.T)
    assert (error <= bound(w_OI, rounded)).all()


@pytest.mark.parametrize("T", [1, 8])
def test_activations_are_rounded_by_the_least_power_of_two_that_holds_them(isa: str, T: int) -> None:
    unit = Matrix(
        "q8g32", pack_quantized(np.eye(32, dtype=np.int8), np.ones((32, 1), np.float16), "q8g32"), 32, 32
    )
    rng = np.random.default_rng(2)
    for largest in (127.0, 2.0**-90 * 127, 2.0**100 * 127, 1.2e-30, 2.5e38, 1.0):
        for most in (largest, np.nextafter(np.float32(largest), np.float32(np.inf))):
            x_TI = (most * rng.uniform(-0.9, 0.9, (T, 32))).astype(np.float32)
            x_TI[:, 7] = -most
            expected = np.stack([int8_groups(x.astype(np.float64)) for x in x_TI])
            assert np.array_equal(kernels.linear(unit, x_TI), expected.astype(np.float32)), most
    for bad in (np.inf, -np.inf, np.nan):
        x_TI = np.full((T, 32), bad, np.float32)
        assert np.isnan(kernels.linear(unit, x_TI)).all()
    one_infinite = np.ones((T, 32), np.float32)
    one_infinite[:, 3] = np.inf
    assert np.isnan(kernels.linear(unit, one_infinite)).all()


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
@pytest.mark.parametrize("size", [1e-29, 1e-31, 1e-37, 1e-42])
def test_activations_next_to_nothing_give_next_to_nothing(isa: str, layout: str, size: float) -> None:
    rng = np.random.default_rng(1)
    matrix = packed(rng, layout, 16, 64)
    x_TI = (size * rng.standard_normal((1, 64))).astype(np.float32)
    x_TI[0, 1] = 0  # times an infinite inverse, this would be no number
    w_OI = unpack(matrix.data, layout, 16, 64)
    most = np.abs(w_OI).sum(1) * np.abs(x_TI).max()
    y_TO = kernels.linear(matrix, x_TI)
    assert (np.abs(y_TO) <= 1.01 * most).all()
    assert (y_TO != 0).any() == (size > 1e-30)


@pytest.mark.parametrize("layout", ["q4b32", "q3b32"])
@pytest.mark.parametrize("T", [*range(17, 25), 301])  # on Zen 4 any number in the last tile; 301: three parts
def test_many_tokens_have_the_bits_of_each_alone(isa: str, layout: str, T: int) -> None:
    rng = np.random.default_rng(T)
    matrix = packed(
        rng, layout, 45, 352
    )  # a row block beside another and one without; a chunk of 8 groups and one of 3
    size_T1 = 10.0 ** rng.uniform(-31, 36, (T, 1))
    x_TI = (size_T1 * rng.standard_normal((T, 352))).astype(np.float32)
    x_TI[3, 40] = np.inf
    x_TI[7], x_TI[11, 32:64] = 0, 0
    y_TO = kernels.linear(matrix, x_TI)
    alone_TO = np.concatenate([kernels.linear(matrix, x_TI[t : t + 1]) for t in range(T)])
    assert np.array_equal(y_TO.view(np.uint32), alone_TO.view(np.uint32))
    assert np.unique(np.nonzero(np.isnan(y_TO))[0]).tolist() == [3]


@pytest.mark.parametrize("layout", ["q4b32", "q3b32"])
def test_zen_4_has_a_way_of_its_own_for_16_tokens_and_more(isa: str, layout: str) -> None:
    # It gives the same bits, so what shows it is a term beyond 3.4e38 that a fused step brings back: 3.6e38 - 2.4e38.
    q_OI = np.full((16, 64), LAYOUTS[layout].zero, np.int8)
    q_OI[:, 0], q_OI[:, 32] = 8 - 4, 8 + 6
    data = pack_quantized(q_OI, np.ones((16, 2), np.float16), layout)
    x_TI = np.full((16, 64), 6e37, np.float32)
    for T in (1, 8, 15, 16):
        y_TO = kernels.linear(Matrix(layout, data, 16, 64), x_TI[:T])
        assert np.isinf(y_TO).all() if (isa, T) == ("zen4", 16) else np.isfinite(y_TO).all(), T


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q8g32"])
@pytest.mark.parametrize("T", [1, 3, 8, 24])
def test_nothing_behind_the_last_row_block_is_read(isa: str, layout: str, T: int) -> None:
    rng = np.random.default_rng(T)
    made = packed(rng, layout, 48, 96)
    size = -(-made.data.size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    room = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(room.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    at_the_end = room[size - made.data.size : size]
    at_the_end[:] = made.data
    x_TI = rng.standard_normal((T, 96), dtype=np.float32)
    y_TO = kernels.linear(Matrix(layout, at_the_end, 48, 96), x_TI)  # if it were, this process would end here
    assert np.array_equal(y_TO, kernels.linear(made, x_TI))


@pytest.mark.parametrize("kind", GGML)
@pytest.mark.parametrize("T", [1, 5])
def test_ggml_products_follow_the_gguf_package(isa: str, kind: str, T: int) -> None:
    rng = np.random.default_rng(len(kind) + T)
    O, I = 37, 512
    data = random_blocks(rng, kind, O, I)
    type_ = gguf.GGMLQuantizationType[kind]
    w_OI = gguf.dequantize(data.reshape(O, -1), type_).reshape(O, I).astype(np.float64)
    x_TI = rng.standard_normal((T, I), dtype=np.float32)
    rounded = np.stack([int8_groups(x.astype(np.float64)) for x in x_TI])
    matrix = Matrix(kind, data, O, I)
    error = np.abs(kernels.linear(matrix, x_TI) - rounded @ w_OI.T)
    # Types with a minimum subtract two large sums: their magnitude is that of both parts, at most 4 x here.
    assert (error <= 4 * bound(w_OI, rounded)).all()
    ids = np.array([0, 36, 5], np.int32)
    assert np.abs(kernels.embed(matrix, ids) - w_OI[ids]).max() <= 4 * U32 * np.abs(w_OI).max() * 4


@pytest.mark.parametrize("kind", [kind for kind in GGML if kernels.packed_as(kind)])
@pytest.mark.parametrize("T", [1, 2, 5, 8, 15])
def test_packed_ggml_types_give_the_bits_of_the_stored_ones(isa: str, kind: str, T: int) -> None:
    rng = np.random.default_rng(len(kind) + T)
    O, I = 37, 768
    stored = Matrix(kind, np.concatenate([random_blocks(rng, kind, O, I) for _ in range(2)]), O, I, 2)
    x_T2I = rng.standard_normal((T, 2, I), dtype=np.float32)
    packed_matrix = kernels.pack(stored)
    assert packed_matrix.layout == kernels.packed_as(kind)
    assert np.array_equal(kernels.linear_heads(packed_matrix, x_T2I), kernels.linear_heads(stored, x_T2I))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_float_products_are_not_quantized(isa: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    O, I, T = 33, 256, 3
    w_OI = rng.standard_normal((O, I), dtype=np.float32)
    data = gguf.quantize(w_OI, gguf.GGMLQuantizationType[kind])
    exact = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(O, I).astype(np.float64)
    x_TI = rng.standard_normal((T, I), dtype=np.float32)
    y_TO = kernels.linear(Matrix(kind, data.reshape(-1).view(np.uint8), O, I), x_TI)
    # 16 lanes: 16 fused steps each, then 4 additions.
    assert (np.abs(y_TO - x_TI @ exact.T) <= gamma(20) * (np.abs(x_TI) @ np.abs(exact).T)).all()


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
def test_embedding_rows_are_the_weights(isa: str, layout: str) -> None:
    matrix = packed(np.random.default_rng(4), layout, 50, 96)
    rows_OI = unpack(matrix.data, layout, 50, 96).astype(np.float32)
    few = [0, 15, 16, 49, 3]  # which one thread looks up; the others are dealt out
    for ids in (few, 4 * few, [*few, *range(50)]):
        assert np.array_equal(kernels.embed(matrix, np.array(ids, np.int32)), rows_OI[ids])


@pytest.mark.parametrize("layout", ["q4b32", "q3b32"])
def test_each_scale_of_one_byte_is_read_for_what_it_stands_for(isa: str, layout: str) -> None:
    matrix, w_OI = every_byte(layout)
    assert np.array_equal(kernels.embed(matrix, np.arange(16, dtype=np.int32)), w_OI)
    one_of_each_group = np.kron(np.eye(16), np.eye(1, 32)).astype(np.float32)
    for T in (1, 2, 4, 8, 16):
        y_TO = np.concatenate([kernels.linear(matrix, x) for x in np.split(one_of_each_group, 16 // T)])
        assert np.array_equal(y_TO.T, w_OI[:, ::32]), T
    twice_TO = kernels.linear(matrix, np.tile(one_of_each_group, (2, 1)))
    assert np.array_equal(twice_TO, np.tile(w_OI[:, ::32].T, (2, 1)))


@pytest.mark.parametrize("T", [1, 5])
def test_each_head_gets_its_own_matrix_and_activations(isa: str, T: int) -> None:
    rng = np.random.default_rng(5)
    matrix = packed(rng, "q8g32", 24, 64, count=3)
    x_THI = rng.standard_normal((T, 3, 64), dtype=np.float32)
    y_THO = kernels.linear_heads(matrix, x_THI)
    for h in range(3):
        size = matrix.data.size // 3
        single = Matrix("q8g32", matrix.data[h * size : (h + 1) * size], 24, 64)
        assert np.array_equal(y_THO[:, h], kernels.linear(single, np.ascontiguousarray(x_THI[:, h])))


def test_rms_norm_follows_the_formula(isa: str) -> None:
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((3, 128), dtype=np.float32), rng.standard_normal(128, dtype=np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
    # 8 + 4 roundings of the sum (halved by the root), and 6 more.
    assert (np.abs(kernels.rms_norm(x, w, 1e-5) - exact) <= gamma(12) * np.abs(exact)).all()


def test_the_router_chooses_by_bias_and_weighs_without_it(isa: str) -> None:
    rng = np.random.default_rng(7)
    x, router = (
        rng.standard_normal((20, 64), dtype=np.float32),
        rng.standard_normal((9, 64), dtype=np.float32) / np.float32(8),
    )
    bias = rng.standard_normal(9, dtype=np.float32)
    ids, weights = kernels.route(x, router, bias, 4, 2.446)
    score = 1 / (1 + np.exp(-(x.astype(np.float64) @ router.T)))
    for t in range(20):
        chosen = sorted(np.argsort(-(score[t] + bias), kind="stable")[:4])
        assert list(ids[t]) == chosen
        expected = score[t][chosen] / score[t][chosen].sum() * 2.446
        assert (
            np.abs(weights[t] - expected) <= gamma(40) * expected
        ).all()  # 8 in the product, ~20 in exp, the rest


def test_equal_scores_go_to_the_lower_index(isa: str) -> None:
    ids, weights = kernels.route(
        np.ones((1, 16), np.float32), np.zeros((6, 16), np.float32), np.zeros(6, np.float32), 3, 1
    )
    assert list(ids[0]) == [0, 1, 2]
    assert np.abs(weights - 1 / 3).max() <= 4 * U32


def mlp_formula(parts: list[NDArray[Any]], x_D: NDArray[Any]) -> NDArray[Any]:
    gate, up, down = parts
    rounded = int8_groups(x_D)
    g = gate @ rounded
    return np.asarray(down @ int8_groups(g / (1 + np.exp(-g)) * (up @ rounded)))


# 800 rows of down are 50 row blocks: for one thread or two, tasks of eight, and one of what is left.
@pytest.mark.parametrize("D", [64, 800])
def test_a_mixture_is_the_weighted_sum_of_its_experts_and_the_shared_one(isa: str, D: int) -> None:
    rng = np.random.default_rng(8)
    F, E, T = 32, 5, 11

    def stack(count: int, width: int) -> tuple[Mlp, list[list[NDArray[Any]]]]:
        gate, up = (packed(rng, "q4b32", width, D, count) for _ in range(2))
        made = (gate, up, packed(rng, "q4b32", D, width, count))
        per = [np.split(m.data, count) for m in made]
        weights = [
            [unpack(per[i][e], "q4b32", made[i].rows, made[i].columns) for i in range(3)]
            for e in range(count)
        ]
        return Mlp(width, D, count, matrices=made), weights

    (routed, w_routed), (shared, w_shared) = stack(E, F), stack(1, 2 * F)
    x = rng.standard_normal((T, D), dtype=np.float32)
    ids = np.stack([np.sort(rng.permutation(E)[:2]) for _ in range(T)]).astype(np.int32)
    weights = rng.uniform(0.2, 2, (T, 2)).astype(np.float32)
    y = kernels.mixture(routed, shared, x, ids, weights)
    for t in range(T):
        x64 = x[t].astype(np.float64)
        exact = sum(w * mlp_formula(w_routed[e], x64) for e, w in zip(ids[t], weights[t], strict=True))
        exact = exact + mlp_formula(w_shared[0], x64)
        # A hidden value on the border of two int8 steps may fall either way: one step of one channel.
        step = max(np.abs(m).max() for w in (*w_routed, *w_shared) for m in w) * 2 * np.abs(y).max() / 127
        assert np.abs(y[t] - exact).max() <= step
    one = np.concatenate(
        [kernels.mixture(routed, shared, x[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(T)]
    )
    assert np.array_equal(y, one)


# Where many tokens have a way of their own, they stand otherwise for it, which up then has not, or gate, or down.
@pytest.mark.parametrize(
    "layouts", [("q4b32", "q3b32", "q8g32"), ("q4b32", "q8g32", "q4b32"), ("q8g32", "q4b32", "q3b32")]
)
def test_experts_of_many_tokens_have_the_bits_of_each_alone(isa: str, layouts: tuple[str, str, str]) -> None:
    rng = np.random.default_rng(9)
    D, F, E, T = 96, 64, 3, 61
    shapes = ((F, D), (F, D), (D, F))

    def stack(count: int) -> Mlp:
        gate, up, down = (
            packed(rng, layout, *shape, count) for layout, shape in zip(layouts, shapes, strict=True)
        )
        return Mlp(F, D, count, matrices=(gate, up, down))

    routed, shared = stack(E), stack(1)
    x_TD = rng.standard_normal((T, D), dtype=np.float32)
    ids_TA = np.stack([np.sort(rng.permutation(E)[:2]) for _ in range(T)]).astype(np.int32)
    weights_TA = rng.uniform(0.2, 2, (T, 2)).astype(np.float32)
    y_TD = kernels.mixture(routed, shared, x_TD, ids_TA, weights_TA)
    one_by_one = [
        kernels.mixture(routed, shared, x_TD[t : t + 1], ids_TA[t : t + 1], weights_TA[t : t + 1])
        for t in range(T)
    ]
    assert np.array_equal(y_TD, np.concatenate(one_by_one))


@pytest.mark.parametrize("layout", ["q4b32", "q8g32", "F32"])
@pytest.mark.parametrize("T", [1, 3, 33])
def test_a_mixture_in_two_places_has_the_bits_of_one_in_one_place(isa: str, layout: str, T: int) -> None:
    rng = np.random.default_rng(T)
    D, F, E, A = 64, 96, 7, 3

    def stack(count: int) -> Mlp:
        shapes = ((F, D), (F, D), (D, F))
        if layout == "F32":
            values = [rng.standard_normal((count, *shape), np.float32) for shape in shapes]
            made = [
                Matrix("F32", v.reshape(-1).view(np.uint8), *shape, count)
                for v, shape in zip(values, shapes, strict=True)
            ]
        else:
            made = [packed(rng, layout, *shape, count) for shape in shapes]
        return Mlp(F, D, count, matrices=(made[0], made[1], made[2]))

    routed, shared = stack(E), stack(1)
    x_TD, residual_TD = (rng.standard_normal((T, D), np.float32) for _ in range(2))
    ids_TA = np.stack([np.sort(rng.permutation(E)[:A]) for _ in range(T)]).astype(np.int32)
    weights_TA = rng.uniform(0.2, 2, (T, A)).astype(np.float32)
    expected_TD = residual_TD + kernels.mixture(routed, shared, x_TD, ids_TA, weights_TA)
    outputs_TAD = np.full((T, A, D), np.nan, np.float32)
    here_TA = rng.random(E)[ids_TA] < 0.5  # each expert lies in one place
    for place_TA in (here_TA, ~here_TA):
        tokens_M, slots_M = (i.astype(np.int32) for i in np.nonzero(place_TA))
        outputs_TAD[place_TA] = kernels.expert_outputs(routed, x_TD, ids_TA[tokens_M, slots_M], tokens_M)
    every_T = np.arange(T, dtype=np.int32)
    shared_TD = kernels.expert_outputs(shared, x_TD, np.zeros(T, np.int32), every_T)
    kernels.combine(outputs_TAD, weights_TA, shared_TD, residual_TD)
    assert np.array_equal(residual_TD, expected_TD)


def remembered(
    latent_SC: NDArray[np.float32], key_SR: NDArray[np.float32], room: int
) -> tuple[Any, NDArray[Any], NDArray[Any]]:
    """A cache that holds these positions, and what it then holds, by the formula."""
    C, R = latent_SC.shape[1], key_SR.shape[1]
    # Bytes beyond the present must not be read: 0x7f in a scale is not a number.
    rows, columns = (np.full(n, 0x7F, np.uint8) for n in kernels.latent_cache_bytes(room, C, R))
    cache = kernels.latent_cache(rows, columns, room, C, R)
    kernels.remember(cache, np.ascontiguousarray(np.concatenate([latent_SC, key_SR], 1)), 0)
    latent, key = (np.stack([cached(row) for row in x.astype(np.float64)]) for x in (latent_SC, key_SR))
    return cache, latent, key


def test_attention_sees_the_past_and_itself_only(isa: str) -> None:
    rng = np.random.default_rng(9)
    H, C, R, S = 3, 64, 16, 141  # four groups of 32 positions and a part of one
    latent_SC, key_SR = rng.standard_normal((S, C), np.float32), rng.standard_normal((S, R), np.float32)
    for T in (1, 5):
        q, qr = rng.standard_normal((T, H, C), np.float32), rng.standard_normal((T, H, R), np.float32)
        cache, latent, key = remembered(latent_SC, key_SR, 200)
        u = kernels.latent_attention(cache, q, qr, S - T, 0.2)
        for t in range(T):
            n = S - T + t + 1
            columns = turned(latent[:n])
            for h in range(H):
                both = np.concatenate([q[t, h], qr[t, h], np.zeros(-R % 32)])
                rounded = int8_groups(both)
                score = 0.2 * (latent[:n] @ rounded[:C] + key[:n] @ rounded[C : C + R])
                a = np.exp(score - score.max())
                exact = two_digits(a) @ columns / a.sum()
                # In float32: the scores' error enters through the exponent, then there are the roundings of the sums.
                score_error = gamma(40) * 0.2 * (np.abs(latent[:n]) @ np.abs(rounded[:C])).max() * 2
                magnitude = (a / a.sum()) @ np.abs(columns)
                assert (np.abs(u[t, h] - exact) <= (score_error + gamma(60)) * magnitude).all()


def whole_steps(rng: np.random.Generator, *shape: int) -> NDArray[np.int8]:
    """Int8 values [..., rows, columns]; the largest of each group of 32, in rows and in columns, is 127."""
    q = rng.integers(-127, 128, shape).astype(np.int8)
    q[..., ::32] = q[..., ::32, :] = 127
    return q


def stored(q_HOI: NDArray[np.int8], layout: str) -> Matrix:
    """The matrices q / 128, which all three layouts hold exactly."""
    H, O, I = q_HOI.shape
    if layout == "F32":
        data = (q_HOI / np.float32(128)).reshape(-1).view(np.uint8)
    else:
        scales, bias = np.full((O, I // 32), 1 / 128, np.float16), 0 if layout == "q8g32" else 8
        data = np.concatenate([pack_quantized(q_OI + np.int8(bias), scales, layout) for q_OI in q_HOI])
    return Matrix(layout, data, O, I, H)


@pytest.mark.parametrize("layout", ["q8g32", "q4b32", "F32"])
@pytest.mark.parametrize(("start", "T"), [(0, 45), (37, 20), (64, 1), (93, 4)])
def test_expanded_attention_follows_the_formula(isa: str, layout: str, start: int, T: int) -> None:
    rng = np.random.default_rng(start)
    H, C, R, N, V, S = 2, 64, 16, 64, 48, start + T
    # Whole steps of powers of two: keys and values are sums without a rounding, so the oracle rounds them as the kernel does.
    latent_SC = (whole_steps(rng, S, C) / 32).astype(np.float32)
    key_SR = rng.standard_normal((S, R), np.float32)
    k_HCN, v_HVC = whole_steps(rng, H, C, N), whole_steps(rng, H, V, C)
    if layout == "q4b32":
        k_HCN, v_HVC = k_HCN // 16, v_HVC // 16
    cache, latent, key = remembered(latent_SC, key_SR, 200)
    q_THN, qr_THR = rng.standard_normal((T, H, N), np.float32), rng.standard_normal((T, H, R), np.float32)
    k_b, v_b, scale = stored(k_HCN, layout), stored(v_HVC, layout), 0.02
    o_THV = kernels.expanded_attention(cache, k_b, v_b, q_THN, qr_THR, start, scale)
    for h in range(H):
        turned_NC = np.stack([cached(row) for row in k_HCN[h].T / 128])
        key_SN = np.stack([cached(turned_NC @ c) for c in latent])
        value_SV = latent @ v_HVC[h].T / 128
        steps_S = np.abs(value_SV).max(1) / 127
        quotient_SV = value_SV / steps_S[:, None]
        value_SV = np.rint(quotient_SV)
        tie_SV = (
            np.abs(np.abs(quotient_SV - value_SV) - 0.5) < gamma(2) * 127
        )  # in float32 it may fall to either side
        for t in range(T):
            n = start + t + 1
            rounded = int8_groups(np.concatenate([q_THN[t, h], qr_THR[t, h], np.zeros(-R % 32)]))
            score = scale * (key_SN[:n] @ rounded[:N] + key[:n] @ rounded[N : N + R])
            a = np.exp(score - score.max())
            weight = a * steps_S[:n]
            exact = two_digits_of_the_ends(weight) @ value_SV[:n] / a.sum()
            # As for the absorbed form.
            score_error = gamma(40) * scale * (np.abs(key_SN[:n]) @ np.abs(rounded[:N])).max() * 2
            bound = (score_error + gamma(60)) * (weight @ np.abs(value_SV[:n])) + weight @ tie_SV[:n]
            assert (np.abs(o_THV[t, h] - exact) <= bound / a.sum()).all(), (h, t)


@pytest.mark.parametrize(
    ("kind", "packed_first"),
    [(kind, first) for kind in GGML for first in (False, True) if kernels.packed_as(kind) or not first],
)
def test_expanded_attention_reads_any_k_b_as_the_floats_it_stands_for(
    isa: str, kind: str, packed_first: bool
) -> None:
    rng = np.random.default_rng(len(kind))
    H, C, R, N, V, S = 2, 64, 16, 256, 32, 40
    data = np.concatenate([random_blocks(rng, kind, C, N) for _ in range(H)])
    floats = gguf.dequantize(data.reshape(H * C, -1), gguf.GGMLQuantizationType[kind]).astype(np.float32)
    k_b, as_floats = Matrix(kind, data, C, N, H), Matrix("F32", floats.reshape(-1).view(np.uint8), C, N, H)
    if packed_first:
        k_b = kernels.pack(k_b)
    v_b = packed(rng, "q8g32", V, C, count=H)
    latent_SC, key_SR = rng.standard_normal((S, C), np.float32), rng.standard_normal((S, R), np.float32)
    cache, _, _ = remembered(latent_SC, key_SR, 64)
    q_SHN, qr_SHR = rng.standard_normal((S, H, N), np.float32), rng.standard_normal((S, H, R), np.float32)
    found, expected = (
        kernels.expanded_attention(cache, k, v_b, q_SHN, qr_SHR, 0, 0.1) for k in (k_b, as_floats)
    )
    assert np.array_equal(found, expected)


def two_digits_of_the_ends(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax weights in int8 groups of 32 positions, the first group and the last with a second digit."""
    pad = np.pad(a, (0, -len(a) % 32)).reshape(-1, 32)
    digits = np.stack([int8_groups(group) for group in pad])
    for i in {0, len(pad) - 1}:
        digits[i] += int8_groups(pad[i] - digits[i])
    return np.asarray(digits.reshape(-1)[: len(a)])


def test_the_cache_does_not_depend_on_how_it_was_filled(isa: str) -> None:
    rng = np.random.default_rng(13)
    H, C, R, S = 4, 64, 32, 100
    latent_SC, key_SR = rng.standard_normal((S, C), np.float32), rng.standard_normal((S, R), np.float32)
    q, qr = rng.standard_normal((S, H, C), np.float32), rng.standard_normal((S, H, R), np.float32)
    whole = kernels.latent_attention(remembered(latent_SC, key_SR, S)[0], q, qr, 0, 0.2)
    both = np.ascontiguousarray(np.concatenate([latent_SC, key_SR], 1))
    cache = remembered(latent_SC[::-1].copy(), key_SR, S)[0]  # another past, to be written over
    at = 0
    for n in (1, 30, 1, 1, 31, 36):
        kernels.remember(cache, both[at : at + n], at)
        part = kernels.latent_attention(cache, q[at : at + n], qr[at : at + n], at, 0.2)
        assert np.array_equal(part, whole[at : at + n])
        at += n


def test_all_instruction_sets_and_thread_counts_give_the_same_bits() -> None:
    rng = np.random.default_rng(10)
    matrices = [packed(rng, layout, 45, 320) for layout in ("q4b32", "q3b32", "q4g32", "q8g32")]
    matrices += [Matrix(kind, random_blocks(rng, kind, 45, 512), 45, 512) for kind in GGML]
    matrices += [kernels.pack(m) for m in matrices if kernels.packed_as(m.layout)]
    before, results = kernels.isa(), []
    try:
        for name in kernels.usable_isas():
            for threads in (1, 2, 4):
                kernels.use_isa(name)
                kernels.set_threads(threads)
                x = np.random.default_rng(11).standard_normal((9, 512), dtype=np.float32)
                results.append([kernels.linear(m, np.ascontiguousarray(x[:, : m.columns])) for m in matrices])
    finally:
        kernels.use_isa(before)
        kernels.set_threads(None)
    for result in results:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_exponentials_are_exact_to_a_few_units_in_the_last_place(isa: str) -> None:
    x = np.linspace(-25, 80, 100_000).astype(np.float32).reshape(-1, 16)
    # The router's sigmoid of a product with the unit matrix is 1 / (1 + exp(-x)).
    eye, none = np.eye(16, dtype=np.float32), np.zeros(16, np.float32)
    _, weights = kernels.route(x, eye, none, 16, 1.0)
    score = 1 / (1 + np.exp(-x.astype(np.float64)))
    expected = score / score.sum(1, keepdims=True)
    # From -25 up the 1e-20 in the sum does not count. At |x| = 80 the float32 n ln 2 is off by 2^-24 * 80 at most; a polynomial and two divisions add 12 roundings.
    assert (np.abs(weights - expected) <= (gamma(80) + gamma(12)) * 2 * expected + 1e-37).all()


@pytest.mark.parametrize("name", kernels.usable_isas())
def test_a_forced_instruction_set_is_the_one_in_use(name: str) -> None:
    code = "from kimi_lite.runtime import kernels; print(kernels.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KIMI_LITE_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == name


def test_a_wrong_instruction_set_is_an_error_that_lists_the_right_ones() -> None:
    command = [sys.executable, "-m", "kimi_lite", "doctor"]
    done = subprocess.run(
        command,
        env={**os.environ, "KIMI_LITE_ISA": "doesnotexist"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "doesnotexist" in done.stderr
    assert "scalar" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_shapes_are_refused_at_the_border() -> None:
    matrix = packed(np.random.default_rng(12), "q4g32", 16, 64)
    with pytest.raises(ValueError, match="x's width is 32, expected 64"):
        kernels.linear(matrix, np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match="does not lie in its data"):
        _kernels.Weights("q4g32", matrix.data[:-1].copy(), 0, 576, 16, 64)
    with pytest.raises(ValueError, match="token id lies outside"):
        kernels.embed(matrix, np.array([16], np.int32))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n", [0, 1, (1 << 18) - 1, 1 << 18, (3 << 18) + 5])
def test_copies_are_whole_and_nothing_beside_them_changes(n: int, n_threads: int) -> None:
    source = np.random.default_rng(n).integers(1, 256, n, np.uint8)
    to = np.zeros(n + 2, np.uint8)
    try:
        kernels.set_threads(n_threads)
        kernels.copy(to[1:-1], source)
    finally:
        kernels.set_threads(None)
    np.testing.assert_array_equal(to, np.pad(source, 1))
    with pytest.raises(ValueError, match="size"):
        kernels.copy(to, source)
