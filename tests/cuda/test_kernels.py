"""Single kernels, run thread by thread on the CPU, against the CPU engine and against formulas in numpy: equal bits."""

import numpy as np
import pytest
from card_memory import empty_rows, fetched, get, int8_rows, put
from fake_driver import FakeDriver
from numpy.typing import NDArray
from random_matrix import every_byte, packed

from kimi_lite.formats.packed import row_block_bytes
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cuda import halves
from kimi_lite.runtime.cuda.cuda import FORMS
from kimi_lite.runtime.cuda.device import MANY, MOST_TOKENS
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.program import Matrix, Rows

F32 = NDArray[np.float32]


def uploaded(card: Card, m: kernels.Matrix) -> Matrix:
    stride = row_block_bytes(m.layout, m.columns)
    return Matrix(put(card, m.data), FORMS[m.layout], m.rows, m.columns, stride)


def norm(card: Card, x_TD: F32, weight_D: F32, eps: float) -> tuple[F32, Rows]:
    T, D = x_TD.shape
    rows, out = empty_rows(card, T, D), card.allocate(x_TD.nbytes, "a test")
    card.launch("rms_norm", (T,), 256, 4 * (D + 1), put(card, x_TD), put(card, weight_D), D, eps, out, rows)
    return get(card, out, (T, D)), rows


def test_the_shims_half_precision_is_numpys(fake: FakeDriver) -> None:
    halves_X = np.arange(1 << 16, dtype=np.uint16)
    finite_X = halves_X[np.isfinite(halves_X.view(np.float16))]
    assert all(fake.float(int(h)) == float(h.view(np.float16)) for h in finite_X)
    # Every border between two halves, and what lies just beside it.
    middle_X = (finite_X[:-1].view(np.float16).astype(np.float64) + finite_X[1:].view(np.float16)) / 2
    border_X = middle_X[:: 1 << 4].astype(np.float32)
    for x_X in (
        border_X,
        np.nextafter(border_X, np.float32(np.inf)),
        np.nextafter(border_X, np.float32(-np.inf)),
    ):
        with np.errstate(over="ignore"):
            expected_X = x_X.astype(np.float16).view(np.uint16)
        assert [fake.half(int(b)) for b in x_X.view(np.int32)] == expected_X.tolist()


# Where a lane of a warp keeps the elements of a tensor core's step, written down from the PTX ISA's figures of m16n8k32 for
# 8-bit integers: for each register the row and the column of its lowest byte, or of its only number; the bytes of a and b
# that follow are the next columns of a, the next rows of b.
LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE & 3
HELD = {
    "a": [(GROUP, 4 * IN_GROUP), (GROUP + 8, 4 * IN_GROUP), (GROUP, 4 * IN_GROUP + 16), (GROUP + 8, 4 * IN_GROUP + 16)],
    "b": [(4 * IN_GROUP, GROUP), (4 * IN_GROUP + 16, GROUP)],
    "c": [(GROUP, 2 * IN_GROUP), (GROUP, 2 * IN_GROUP + 1), (GROUP + 8, 2 * IN_GROUP), (GROUP + 8, 2 * IN_GROUP + 1)],
}  # fmt: skip


@pytest.mark.parametrize("by_quarters", [False, True])
def test_the_shims_tensor_core_keeps_the_fragments_of_the_ptx_isa(
    fake: FakeDriver, by_quarters: bool
) -> None:
    rng = np.random.default_rng(0)
    for low, high in ((-128, 128), (127, 128), (-128, -127), (0, 16)):
        a_MK, b_KN = (rng.integers(low, high, shape, np.int8) for shape in ((16, 32), (32, 8)))
        c_MN = rng.integers(-(1 << 30), 1 << 30, (16, 8), np.int32)
        registers = {
            "a": [np.stack([a_MK[row, column + i] for i in range(4)], 1) for row, column in HELD["a"]],
            "b": [np.stack([b_KN[row + i, column] for i in range(4)], 1) for row, column in HELD["b"]],
        }
        a_X4, b_X2 = (
            np.concatenate([r.view("<u4") for r in registers[name]], 1).copy() for name in ("a", "b")
        )
        c_X4 = np.stack([c_MN[held] for held in HELD["c"]], 1)
        out_MN = np.zeros_like(c_MN)
        for i, out_X in enumerate(fake.mma(a_X4, b_X2, c_X4, by_quarters=by_quarters).T):
            out_MN[HELD["c"][i]] = out_X
        np.testing.assert_array_equal(out_MN, c_MN + a_MK.astype(np.int32) @ b_KN.astype(np.int32))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("D", [32, 288])
def test_norm_gives_the_cpus_floats_and_their_int8_rows(
    card: Card, fake: FakeDriver, D: int, backwards: bool
) -> None:
    fake.order(backwards=backwards)
    rng = np.random.default_rng(D)
    x_TD, weight_D = rng.standard_normal((3, D), dtype=np.float32), rng.standard_normal(D, dtype=np.float32)
    x_TD[1, :32] = 0  # a group of zeros has scale 0
    x_TD[2] = 0
    ours_TD, rows = norm(card, x_TD, weight_D, 1e-5)
    expected_TD = kernels.rms_norm(x_TD, weight_D, 1e-5)
    np.testing.assert_array_equal(ours_TD.view(np.int32), expected_TD.view(np.int32))
    for found, formula in zip(fetched(card, rows, 3), int8_rows(expected_TD), strict=True):
        np.testing.assert_array_equal(found, formula)


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
@pytest.mark.parametrize(("O", "I"), [(16, 32), (17, 64), (45, 288), (33, 1408), (16, 2304)])
@pytest.mark.parametrize("T", [1, 3, 8, 33, MANY, MANY + 17])
def test_products_are_the_cpus(card: Card, layout: str, O: int, I: int, T: int) -> None:
    rng = np.random.default_rng(O * I + T)
    matrix, other = packed(rng, layout, O, I), packed(rng, "q8g32", 20, I)
    x_TI, before_TO = (
        rng.standard_normal((T, I), dtype=np.float32),
        rng.standard_normal((T, O), dtype=np.float32),
    )
    normed_TI, rows = norm(card, x_TI, np.ones(I, np.float32), 1e-5)
    ya, yb = put(card, before_TO), card.allocate(T * 20 * 4, "a test")
    halves.product(card, uploaded(card, matrix), uploaded(card, other), rows, T, ya, yb, add=False)
    product_TO = kernels.linear(matrix, normed_TI)
    np.testing.assert_array_equal(get(card, ya, (T, O)), product_TO)
    np.testing.assert_array_equal(get(card, yb, (T, 20)), kernels.linear(other, normed_TI))
    card.upload(ya, before_TO)
    halves.product(card, uploaded(card, matrix), halves.NO_MATRIX, rows, T, ya, 0, add=True)
    np.testing.assert_array_equal(get(card, ya, (T, O)), before_TO + product_TO)


@pytest.mark.parametrize("layout", ["q4b32", "q3b32"])
@pytest.mark.parametrize("T", [1, 8, 33])
def test_each_scale_of_one_byte_is_the_cpus(card: Card, T: int, layout: str) -> None:
    matrix, _ = every_byte(layout)
    x_TI = np.random.default_rng(T).standard_normal((T, 512), dtype=np.float32)
    normed_TI, rows = norm(card, x_TI, np.ones(512, np.float32), 1e-5)
    y = card.allocate(T * 16 * 4, "a test")
    halves.product(card, uploaded(card, matrix), halves.NO_MATRIX, rows, T, y, 0, add=False)
    np.testing.assert_array_equal(get(card, y, (T, 16)), kernels.linear(matrix, normed_TI))


@pytest.mark.parametrize("layout", ["q4b32", "q3b32", "q4g32", "q8g32"])
@pytest.mark.parametrize(
    ("T", "H", "O", "I"),
    [(1, 3, 64, 96), (3, 2, 32, 32), (9, 2, 96, 288), (MANY, 2, 128, 32), (MANY + 9, 1, 160, 544)],
)
def test_products_of_heads_are_the_cpus_and_come_quantized(
    card: Card, layout: str, T: int, H: int, O: int, I: int
) -> None:
    rng = np.random.default_rng(T * O)
    matrix = packed(rng, layout, O, I, H)
    x_XI = rng.standard_normal((T * H, I), dtype=np.float32)
    normed_XI, rows = norm(card, x_XI, np.ones(I, np.float32), 1e-5)
    y = empty_rows(card, T * H, O)
    halves.heads(card, uploaded(card, matrix), matrix.data.size // H, rows, H, T, y)
    expected_THO = kernels.linear_heads(matrix, normed_XI.reshape(T, H, I))
    for found, formula in zip(
        fetched(card, y, T * H), int8_rows(expected_THO.reshape(T * H, O)), strict=True
    ):
        np.testing.assert_array_equal(found, formula)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("T", "E", "A", "D"),
    [(1, 8, 3, 256), (33, 8, 3, 64), (MOST_TOKENS, 64, 6, 32), (5, 67, 6, 96), (9, 300, 8, 32)],
)
def test_routing_is_the_cpus_and_deals_the_slots_of_resident_experts_out(
    card: Card, fake: FakeDriver, T: int, E: int, A: int, D: int, backwards: bool
) -> None:
    fake.order(backwards=backwards)
    rng = np.random.default_rng(T * E)
    h_TD, router_ED = (
        rng.standard_normal((T, D), dtype=np.float32),
        rng.standard_normal((E, D), dtype=np.float32),
    )
    bias_E = rng.normal(0, 0.1, E).astype(np.float32)
    router_ED[E // 2 :] = router_ED[: E - E // 2]  # ties
    bias_E[E // 2 :] = bias_E[: E - E // 2]
    resident_E = rng.random(E) < 0.7
    scores, n_slots = card.allocate(4 * T * E, "a test"), T * A
    ids, weights, slots = (card.allocate(4 * n_slots, "a test") for _ in range(3))
    jobs = card.allocate(12 * E, "a test")
    card.launch("route", (-(-E // 8), T), 128, 0, put(card, h_TD), put(card, router_ED), D, E, scores)
    table = put(card, resident_E.astype(np.uint64))
    halves.choose(card, scores, put(card, bias_E), T, E, A, 2.446, table, ids, weights, jobs, slots)
    expected_TA, expected_weights_TA = kernels.route(h_TD, router_ED, bias_E, A, 2.446)
    np.testing.assert_array_equal(get(card, ids, (T, A), np.int32), expected_TA)
    np.testing.assert_array_equal(get(card, weights, (T, A)), expected_weights_TA)
    slots_X, at = get(card, slots, (n_slots,), np.int32), 0
    acting = [e for e in range(E) if resident_E[e] and (expected_TA == e).any()]
    found = get(card, jobs, (E, 3), np.int32)
    for expert, (job_expert, first, count) in zip(acting, found[: len(acting)], strict=True):
        assert (job_expert, first) == (expert, at)
        np.testing.assert_array_equal(slots_X[first : first + count], np.flatnonzero(expected_TA == expert))
        at += count
    assert not found[len(acting) :, 2].any()
