"""The whole text model on the CPU kernels, straight down.

The two halves of a layer are one native call each (`attention_layer` and `feed_forward_layer` in native/ops.cpp), so
that nothing but two short crossings per layer stands between the kernels. Attention runs in its absorbed form for
prefill and decode alike: queries are taken into latent space, so that all heads read the one cached row of a position.
With sums in one fixed order (docs/kernels.md), a prompt gives the same bits however it is cut.

Dimension key:  T tokens   D hidden   R rope   V vocabulary   M image tokens
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.weights import Weights

PREFILL_CHUNK = 512  # tokens a pass: at full size each expert is read once for about 48 of them
Spliced = tuple[NDArray[np.int64], NDArray[np.float16]]
OnLayer = Callable[[int], None]  # hears after each layer how many are done


class CpuModel:
    """A text model all on the CPU, and its cache."""

    placement = "the CPU"

    def __init__(self, weights: Weights, context: int) -> None:
        """Room for `context` positions, as virtual memory."""
        self.weights, self.cache = weights, LatentCache(weights.config, context)

    def step(self, n_left: int) -> int:
        """Tokens of the next step, of so many that are left."""
        return min(n_left, PREFILL_CHUNK)

    def forward(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None = None, on_layer: OnLayer | None = None
    ) -> Float:
        """Append T tokens to the cache; returns the last one's logits, float32 [V]."""
        return forward(self.weights, self.cache, ids_T, pictures, on_layer)

    def rewind(self, n: int) -> None:
        """Keep the first n cached positions."""
        self.cache.rewind(n)


def forward(
    weights: Weights,
    cache: LatentCache,
    ids_T: NDArray[np.int32],
    pictures: Spliced | None = None,
    on_layer: OnLayer | None = None,
) -> Float:
    """Append T tokens to the cache; returns the last one's logits, float32 [V].

    `pictures` gives embedding rows to the positions of image tokens: (positions [M] in this step, rows [M, D]).
    """
    c, T = weights.config, len(ids_T)
    assert cache.n + T <= cache.context, f"{T} tokens after {cache.n} exceed {cache.context}"
    x_TD = embedded(weights, ids_T, pictures)
    cos_TR, sin_TR = rope_tables(c, cache.n, T)
    for index, layer in enumerate(weights.layers):
        kernels.attend(layer.attention, x_TD, cos_TR, sin_TR, cache.layers[index], cache.n)
        kernels.feed_forward(layer.feed_forward, x_TD)
        if on_layer:
            on_layer(index + 1)
    cache.n += T
    last_1D = kernels.rms_norm(x_TD[-1:], weights.norm_D, c.rms_eps)
    return kernels.linear(weights.head, last_1D).reshape(-1)


def embedded(weights: Weights, ids_T: NDArray[np.int32], pictures: Spliced | None) -> Float:
    """Where the residual stream begins: rows of the embedding and of pictures, float32 [T, D]."""
    x_TD = kernels.embed(weights.embed, ids_T)
    if pictures is not None:
        x_TD[pictures[0]] = pictures[1]
    return x_TD


def rope_tables(c: TextConfig, start: int, T: int) -> tuple[Float, Float]:
    """cos and sin of position · theta^(-2i/R), float32 [T, R/2]; angles in float64, exact at any position."""
    frequency_R = c.rope_theta ** (-np.arange(0, c.rope_dim, 2) / c.rope_dim)
    angle_TR = np.arange(start, start + T)[:, None] * frequency_R
    return np.cos(angle_TR).astype(np.float32), np.sin(angle_TR).astype(np.float32)
