"""The whole text model on the CPU kernels, straight down.

A token's layers are one native call: with two calls a layer, memory idled 12 µs more in each, while Python read its own
objects, which the weights had driven out of the caches. Attention has two forms. Absorbed, queries are taken into latent
space, so that all heads read the one cached row of a position: a token's fewest bytes. Expanded, keys and values of all
heads are made from the cache for the time of a layer: a long prompt's fewest products. They round differently, so
`expands` chooses by the number of tokens alone. Within a form, sums have one fixed order (docs/kernels.md), and a token
has the same bits in whatever pass it comes.

Dimension key:  T tokens   K of them whose logits are asked for   D hidden   R rope   V vocabulary   M image tokens
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.weights import Weights

PREFILL_CHUNK = 4096  # tokens a pass, whose keys and values are made from the cache once: of each 16 kB are kept at full size
BRIEF = 16  # tokens: a pass so short that nobody would watch its layers, or interrupt it between them
Spliced = tuple[NDArray[np.int64], NDArray[np.float16]]
OnLayer = Callable[[int], None]  # hears after each layer how many are done


class CpuModel:
    """A text model all on the CPU, and its cache."""

    placement = "the CPU"

    def __init__(self, weights: Weights, context: int, expanded: bool = True) -> None:
        """Room for `context` positions, as virtual memory. Unless `expanded`, attention is absorbed, as a card's is."""
        self.weights, self.cache, self.expanded = weights, LatentCache(weights.config, context), expanded
        self._layers = kernels.layers(
            [layer.attention for layer in weights.layers],
            [layer.feed_forward for layer in weights.layers],
            self.cache.layers,
        )

    def step(self, n_left: int) -> int:
        """Tokens of the next step, of so many that are left: as few steps as can be, all about as long."""
        return -(-n_left // -(-n_left // PREFILL_CHUNK))

    def forward(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None = None, on_layer: OnLayer | None = None
    ) -> Float:
        """Append T tokens to the cache; returns the last one's logits, float32 [V].

        `pictures` gives embedding rows to the positions of image tokens: (positions [M] in this step, rows [M, D]).
        """
        return self._run(ids_T, pictures, on_layer, 1).reshape(-1)

    def check(self, ids_T: NDArray[np.int32]) -> Float:
        """`forward`, with the logits that follow each of the tokens, float32 [T, V]."""
        return self._run(ids_T, None, None, len(ids_T))

    def _run(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None, on_layer: OnLayer | None, asking: int
    ) -> Float:
        weights, cache, T = self.weights, self.cache, len(ids_T)
        c, L = weights.config, len(weights.layers)
        assert cache.n + T <= cache.context, f"{T} tokens after {cache.n} exceed {cache.context}"
        expanded = self.expanded and expands(c, T)
        x_TD = embedded(weights, ids_T, pictures)
        cos_TR, sin_TR = rope_tables(c, cache.n, T)
        at_once = L if T <= BRIEF else 1
        for first in range(0, L, at_once):
            end = first + at_once
            kernels.run_layers(self._layers, first, end, x_TD, cos_TR, sin_TR, cache.n, expanded, asking)
            if on_layer:
                on_layer(end)
        cache.n += T
        asked_KD = kernels.rms_norm(x_TD[-asking:], weights.norm_D, c.rms_eps)
        return kernels.linear(weights.head, asked_KD)

    def rewind(self, n: int) -> None:
        """Keep the first n cached positions."""
        self.cache.rewind(n)


def expands(c: TextConfig, T: int) -> bool:
    """Is attention of T tokens in one pass expanded?

    Each of them multiplies 2C - N - V pairs fewer a head for every position that it sees, whose keys and values cost
    C (N + V) once. So this is where it pays even if all positions were cached before: 171 tokens at full size.
    """
    return T * (2 * c.kv_rank - c.nope_dim - c.value_dim) >= c.kv_rank * (c.nope_dim + c.value_dim)


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
