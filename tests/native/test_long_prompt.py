"""What a long prompt is cut into: parts of its tokens, and a few heads at a time, whose keys and values lie in memory together.

Nothing of it may show in the bits.
"""

import signal

import numpy as np
import pytest
from numpy.typing import NDArray
from random_matrix import packed, random_blocks

from kimi_lite.runtime import _kernels, kernels
from kimi_lite.runtime.kernels import AttentionLayer, FeedForwardLayer, Matrix, Mlp, Router

F32 = NDArray[np.float32]
PART = 1024  # tokens of a part, at most
# Keys and values of a head take N + R and V bytes a position and their scales, of 48 MB in all: here of 14 heads and of 2.
H, N, R, V, C, S = 16, 128, 64, 128, 32, 10_000


def one_of(matrix: Matrix, index: int) -> Matrix:
    """Matrix `index` of several, alone."""
    size = matrix.data.size // matrix.count
    return Matrix(matrix.layout, matrix.data[index * size :][:size], matrix.rows, matrix.columns)


def filled_cache(rng: np.random.Generator, n: int) -> _kernels.LatentCache:
    rows, columns = (np.zeros(size, np.uint8) for size in kernels.latent_cache_bytes(S, C, R))
    cache = kernels.latent_cache(rows, columns, S, C, R)
    kernels.remember(cache, rng.standard_normal((n, C + R), np.float32), 0)
    return cache


def test_heads_have_the_same_bits_alone_and_among_more_than_fit_at_once() -> None:
    rng = np.random.default_rng(0)
    k_b, v_b = packed(rng, "q8g32", C, N, count=H), packed(rng, "q8g32", V, C, count=H)
    q_THN, qr_THR = (rng.standard_normal((9, H, width), np.float32) for width in (N, R))
    cache, start = filled_cache(rng, S), S - 9
    together_THV = kernels.expanded_attention(cache, k_b, v_b, q_THN, qr_THR, start, 0.1)
    for h in range(H):
        q, qr = (np.ascontiguousarray(x[:, h : h + 1]) for x in (q_THN, qr_THR))
        alone = kernels.expanded_attention(cache, one_of(k_b, h), one_of(v_b, h), q, qr, start, 0.1)
        assert np.array_equal(together_THV[:, h], alone[:, 0]), h


@pytest.mark.parametrize("layout", ["q4b32", "Q5_1", "F16"])  # queries' rows are found in each by another sum
@pytest.mark.parametrize("expanded", [True, False])
def test_attention_in_parts_has_the_bits_of_shorter_passes(layout: str, expanded: bool) -> None:
    rng, D = np.random.default_rng(1), 64
    T = PART + 33  # parts of 529 and 528: the second begins within a tile of 8
    layer = AttentionLayer(
        norm_D=np.ones(D, np.float32),
        q=matrix(rng, layout, H * (N + R), D),
        kv_a=packed(rng, "q8g32", C + R, D),
        kv_norm_C=np.ones(C, np.float32),
        k_b=packed(rng, "q8g32", C, N, count=H),
        v_b=packed(rng, "q8g32", V, C, count=H),
        o=packed(rng, "q8g32", D, H * V),
        eps=1e-5,
        kv_eps=1e-5,
        scale=0.1,
    )
    start = S - T
    x_TD = rng.standard_normal((T, D), np.float32)
    angle_TR = rng.uniform(0, 6, (T, R // 2))
    cos_TR, sin_TR = np.cos(angle_TR).astype(np.float32), np.sin(angle_TR).astype(np.float32)

    def after(*passes: int) -> F32:
        cache, out_TD, at = filled_cache(np.random.default_rng(2), start), x_TD.copy(), 0
        for n in passes:
            here = slice(at, at + n)
            kernels.attend(layer, out_TD[here], cos_TR[here], sin_TR[here], cache, start + at, expanded)
            at += n
        assert at == T
        return out_TD

    whole_TD = after(T)
    assert not np.array_equal(whole_TD, x_TD)
    assert np.array_equal(after(400, T - 400), whole_TD)


def test_experts_of_a_long_prompt_have_the_bits_of_shorter_ones() -> None:
    rng, D, F, E, T = np.random.default_rng(3), 64, 32, 4, 2 * PART + 5

    def mlp(count: int) -> Mlp:
        gate, up = (packed(rng, "q4b32", F, D, count=count) for _ in range(2))
        return Mlp(F, D, count, matrices=(gate, up, packed(rng, "q4b32", D, F, count=count)))

    layer = FeedForwardLayer(
        norm_D=np.ones(D, np.float32),
        eps=1e-5,
        shared=mlp(1),
        routed=mlp(E),
        router=Router(rng.standard_normal((E, D), np.float32), np.zeros(E, np.float32), 2, 1.5),
    )
    x_TD = rng.standard_normal((T, D), np.float32)
    whole_TD, cut_TD = x_TD.copy(), x_TD.copy()
    kernels.feed_forward(layer, whole_TD)
    assert not np.array_equal(whole_TD, x_TD)
    for first in range(0, T, 300):
        kernels.feed_forward(layer, cut_TD[first : first + 300])
    assert np.array_equal(whole_TD, cut_TD)


def test_a_signal_is_heard_between_parts() -> None:
    """A handler that raises ends a pass that would go on."""
    rng, D, F = np.random.default_rng(4), 64, 256
    shapes = ((F, D), (F, D), (D, F))
    gate, up, down = (packed(rng, "q8g32", *shape) for shape in shapes)
    layer = FeedForwardLayer(np.ones(D, np.float32), 1e-5, Mlp(F, D, 1, matrices=(gate, up, down)))
    x_TD = np.ones((256 * PART, D), np.float32)

    def heard(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, heard)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        with pytest.raises(InterruptedError):
            kernels.feed_forward(layer, x_TD)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (x_TD[-PART:] == 1).all()
    kernels.feed_forward(layer, x_TD[:3])  # nothing is left behind that the next call would meet


def matrix(rng: np.random.Generator, layout: str, O: int, I: int) -> Matrix:
    if layout == "F16":
        data = rng.standard_normal((O, I)).astype(np.float16).reshape(-1).view(np.uint8)
        return Matrix(layout, data, O, I)
    if layout == "Q5_1":
        return Matrix(layout, random_blocks(rng, layout, O, I), O, I)
    return packed(rng, layout, O, I)
