"""The image tower's kernels on every instruction set, against formulas written out here in float64."""

from collections.abc import Iterator
from math import erf
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerance import U32, gamma

from kimi_lite.quantize.encode import encode
from kimi_lite.runtime import _kernels, kernels

F32 = NDArray[np.float32]


@pytest.fixture(params=kernels.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


@pytest.mark.parametrize(("O", "I"), [(16, 32), (17, 64), (45, 588), (96, 104), (33, 4304)])
def test_packing_gives_the_encoders_bytes(isa: str, O: int, I: int) -> None:
    w_OI = np.random.default_rng(O).standard_normal((O, I), dtype=np.float32)
    w_OI[0] = 0  # scale 0
    w_OI[1] *= 1e-6  # a subnormal float16 scale
    w_OI[2] = np.float32(2.0**-28)  # below the smallest scale
    expected = encode(w_OI, "q8g32")
    out = np.full(expected.size, 0x55, np.uint8)
    _kernels.pack_q8(w_OI, out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("W", [16, 72, 192, 1152])
def test_layer_norm_follows_the_formula_and_pads_with_zeros(isa: str, W: int) -> None:
    rng = np.random.default_rng(W)
    x = (3 + rng.standard_normal((9, W))).astype(np.float32)
    x[1] = 7  # no variance: eps alone counts
    weight, bias = (rng.standard_normal(W, dtype=np.float32) for _ in range(2))
    out = np.full((9, W + 24), np.nan, np.float32)
    _kernels.layer_norm(x, weight, bias, 1e-5, out)
    d = x.astype(np.float64)
    spread = np.sqrt(d.var(1, keepdims=True) + 1e-5)
    exact = (d - d.mean(1, keepdims=True)) / spread * weight + bias
    # The mean of W values is off by gamma(W / 16 + 4) of their size; the rest is a handful of roundings.
    shift = gamma(W // 16 + 6) * np.abs(d).max(1, keepdims=True) / spread * np.abs(weight)
    bound = 2 * shift + gamma(W // 16 + 12) * (np.abs(exact) + np.abs(bias) + np.abs(weight))
    assert (np.abs(out[:, :W] - exact) <= bound).all()
    assert (out[:, W:] == 0).all()


@pytest.mark.parametrize("exact", [False, True])
def test_both_gelus_follow_their_formulas(isa: str, exact: bool) -> None:
    z = np.concatenate([np.linspace(-12, 12, 4001), [-2.7, 0, 100, -100, 1e-20]]).astype(np.float32)
    bias = np.float32(0.25) * np.ones(z.size, np.float32)
    out = np.full((1, z.size + 3), np.nan, np.float32)
    _kernels.gelu(z[None], bias, exact, out)
    x = (z + bias).astype(np.float64)
    if exact:
        expected = x * 0.5 * (1 + np.array([erf(v / np.sqrt(2)) for v in x]))
        bound = np.abs(x) * (0.5 * 1.5e-7 + gamma(24))  # the polynomial's error, then the roundings
    else:
        u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        expected = x / (1 + np.exp(np.minimum(-2 * u, 700)))
        # u is off by a few roundings of its size, and x sigmoid(2u) turns that into at most |x| / 2 of it; beyond
        # |2u| = 87 the exponential is held, which leaves at most |x| e^-87.
        bound = np.abs(x) * (gamma(16) + np.minimum(np.abs(u), 44) * 4 * U32 + 2e-38)
    assert (np.abs(out[0, : z.size] - expected) <= bound + 1e-37).all()
    other = x * 0.5 * (1 + np.array([erf(v / np.sqrt(2)) for v in x])) if not exact else None
    if other is not None:  # the two differ by 4.7e-4 at -2.7, which the bound sees
        assert np.abs(other - out[0, : z.size])[4001] > 100 * bound[4001]
    assert (out[0, z.size :] == 0).all()


def patch_input(rng: np.random.Generator, N: int, H: int, K: int) -> tuple[F32, F32, F32, F32]:
    qkv = rng.standard_normal((N, 3 * H * K), dtype=np.float32) * np.float32(2)
    qkv[:, 2 * H * K] *= 20  # one channel of v far larger than the others
    angle = rng.uniform(0, 6, (N, K // 2))
    bias = rng.standard_normal(3 * H * K, dtype=np.float32)
    return qkv, bias, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def exact_attention(
    qkv: F32, bias: F32, cos: F32, sin: F32, H: int, K: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Attention in float64, and how far the 16-bit form may be from it, both [N, H, K]."""
    N = len(qkv)
    q, k, v = (qkv.astype(np.float64) + bias).reshape(N, 3, H, K).transpose(1, 2, 0, 3)

    def turned(x: NDArray[Any]) -> NDArray[Any]:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos.astype(np.float64) + 1j * sin)
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    q, k = turned(q), turned(k)
    s = q @ k.transpose(0, 2, 1) / np.sqrt(K)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    # q and k are rounded by half of their largest / 4095, and by float32 on the way there.
    step_q, step_k = (np.abs(x).max(-1, keepdims=True) * (0.5 / 4095 + 8 * U32) for x in (q, k))
    d = (
        np.abs(q).sum(-1, keepdims=True) * step_k.transpose(0, 2, 1) + step_q * np.abs(k).sum(-1)[:, None]
    ) / np.sqrt(K)
    d += K * step_q * step_k.transpose(0, 2, 1) / np.sqrt(K) + 8 * U32 * np.abs(s)
    error = np.expm1(2 * d.max(-1, keepdims=True) + 4e-6) * (p @ np.abs(v) + np.abs(o))
    for start in range(0, N, 128):
        block = slice(start, start + 128)
        most = np.abs(v[:, block]).max(1, keepdims=True)
        share = p[:, :, block]
        error += share.sum(-1, keepdims=True) * most * (0.5 / 511 + 4 * U32)  # v
        error += share.max(-1, keepdims=True) * share.shape[-1] * (0.5 / 32767) * most  # weights
    return o.transpose(1, 0, 2), error.transpose(1, 0, 2) + 16 * U32 * np.abs(o.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("N", "H", "K"), [(4, 1, 36), (127, 2, 72), (128, 3, 48), (300, 2, 72), (140, 1, 128), (33, 2, 4)]
)
def test_attention_stays_within_its_rounding(isa: str, N: int, H: int, K: int) -> None:
    given = patch_input(np.random.default_rng(N), N, H, K)
    store = _kernels.PatchStore(N, H, K)
    store.place(0, *given)
    out = np.full((N, H * K + 8), np.nan, np.float32)
    store.attend(0, out)
    expected, bound = exact_attention(*given, H, K)
    used = np.abs(out[:, : H * K].reshape(N, H, K) - expected) / bound
    assert used.max() <= 1
    assert used.max() > 0.01  # the bound is no barn door
    assert (out[:, H * K :] == 0).all()


def test_equal_scores_average_all_values(isa: str) -> None:
    # Every weight is 1, so that rounding them costs nothing: what remains is the rounding of v, half of 1 / 511.
    N, H, K = 1000, 2, 8
    v = np.random.default_rng(0).uniform(-1, 1, (N, H * K)).astype(np.float32)
    qkv = np.concatenate([np.zeros((N, 2 * H * K), np.float32), v], 1)
    store = _kernels.PatchStore(N, H, K)
    store.place(
        0, qkv, np.zeros(3 * H * K, np.float32), np.ones((N, 4), np.float32), np.zeros((N, 4), np.float32)
    )
    out = np.empty((N, H * K), np.float32)
    store.attend(0, out)
    assert np.abs(out - v.mean(0)).max() <= 0.5 / 511 + gamma(20)


def test_every_isa_gives_the_same_bits_however_rows_come() -> None:
    N, H, K = 700, 3, 72
    given = patch_input(np.random.default_rng(5), N, H, K)
    results = []
    before = kernels.isa()
    try:
        for isa in kernels.usable_isas():
            kernels.use_isa(isa)
            for rows, step in ((N, N), (128, 100), (512, 24)):
                store = _kernels.PatchStore(N, H, K)
                for at in range(0, N, rows):
                    store.place(at, *(g[at : at + rows] if g.ndim == 2 else g for g in given))
                out = np.empty((N, H * K), np.float32)
                for at in range(0, N, step):
                    store.attend(at, out[at : at + step])
                results.append(out)
    finally:
        kernels.use_isa(before)
    assert all(np.array_equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: _kernels.PatchStore(4, 1, 7), "even width"),
        (lambda: _kernels.PatchStore(4, 1, 130), "at most 128"),
        (lambda: _kernels.PatchStore(4, 1, 4).attend(2, np.empty((3, 4), np.float32)), "does not fit"),
        (
            lambda: _kernels.PatchStore(200, 1, 4).place(
                64, *patch_input(np.random.default_rng(0), 10, 1, 4)
            ),
            "whole block",
        ),
        (lambda: _kernels.pack_q8(np.zeros((16, 32), np.float32), np.zeros(543, np.uint8)), "size"),
    ],
)
def test_wrong_shapes_are_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
