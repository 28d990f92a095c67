"""The whole text model on the CPU kernels, straight down.

Attention runs in its absorbed form for prefill and decode alike: queries are taken into latent space, so that all
heads read the one cached row of a position. With sums in one fixed order (docs/kernels.md), a prompt gives the same
bits however it is cut.

Dimension key:  T tokens   D hidden   H heads   N/R/C no-rope, rope, latent   V value width, or vocabulary   A active
                M image tokens
"""

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.weights import Layer, Weights

Spliced = tuple[NDArray[np.int64], NDArray[np.float16]]


def forward(
    weights: Weights, cache: LatentCache, ids_T: NDArray[np.int32], pictures: Spliced | None = None
) -> Float:
    """Append T tokens to the cache; returns the last one's logits, float32 [V].

    `pictures` gives embedding rows to the positions of image tokens: (positions [M] in this step, rows [M, D]).
    """
    c, T = weights.config, len(ids_T)
    assert cache.n + T <= cache.context, f"{T} tokens after {cache.n} exceed {cache.context}"
    x_TD = kernels.embed(weights.embed, ids_T)
    if pictures is not None:
        x_TD[pictures[0]] = pictures[1]
    cos_TR, sin_TR = rope_tables(c, cache.n, T)
    for index, layer in enumerate(weights.layers):
        h_TD = kernels.rms_norm(x_TD, layer.attn_norm_D, c.rms_eps)
        x_TD += attention(layer, c, cache, index, h_TD, cos_TR, sin_TR)
        h_TD = kernels.rms_norm(x_TD, layer.ffn_norm_D, c.rms_eps)
        x_TD += feed_forward(layer, c, h_TD)
    cache.n += T
    last_1D = kernels.rms_norm(x_TD[-1:], weights.norm_D, c.rms_eps)
    return kernels.linear(weights.head, last_1D).reshape(-1)


def attention(
    layer: Layer, c: TextConfig, cache: LatentCache, index: int, h_TD: Float, cos_TR: Float, sin_TR: Float
) -> Float:
    T, start = len(h_TD), cache.n
    q_THK = kernels.linear(layer.q, h_TD).reshape(T, c.n_heads, c.nope_dim + c.rope_dim)
    q_THN, qr_THR = q_THK[..., : c.nope_dim], q_THK[..., c.nope_dim :]
    kv_TX = kernels.linear(layer.kv_a, h_TD)  # X = C + R
    # Cached: the latent after its norm, the key after its rotation.
    latent_TC = kernels.rms_norm(np.ascontiguousarray(kv_TX[:, : c.kv_rank]), layer.kv_norm_C, c.kv_norm_eps)
    cache.latent_LSC[index, start : start + T] = latent_TC
    cache.key_LSR[index, start : start + T] = kernels.rotate(kv_TX[:, c.kv_rank :], cos_TR, sin_TR)
    q_THC = kernels.linear_heads(layer.k_b, np.ascontiguousarray(q_THN))
    u_THC = kernels.latent_attention(
        q_THC,
        kernels.rotate(qr_THR, cos_TR, sin_TR),
        cache.latent_LSC[index],
        cache.key_LSR[index],
        start,
        c.softmax_scale,  # of the whole head, N + R, although the products run over C + R
    )
    o_THV = kernels.linear_heads(layer.v_b, u_THC)
    return kernels.linear(layer.o, o_THV.reshape(T, -1))


def feed_forward(layer: Layer, c: TextConfig, h_TD: Float) -> Float:
    if layer.routed is None or layer.router_ED is None or layer.bias_E is None:
        return kernels.mlp(layer.shared, h_TD)
    ids_TA, weights_TA = kernels.route(h_TD, layer.router_ED, layer.bias_E, c.n_active, c.routed_scale)
    return kernels.mixture(layer.routed, layer.shared, h_TD, ids_TA, weights_TA)


def rope_tables(c: TextConfig, start: int, T: int) -> tuple[Float, Float]:
    """cos and sin of position · theta^(-2i/R), float32 [T, R/2]; angles in float64, exact at any position."""
    frequency_R = c.rope_theta ** (-np.arange(0, c.rope_dim, 2) / c.rope_dim)
    angle_TR = np.arange(start, start + T)[:, None] * frequency_R
    return np.cos(angle_TR).astype(np.float32), np.sin(angle_TR).astype(np.float32)
