"""The latent cache: what attention remembers of every position, and nothing else.

Per layer, the normalised latent (C values) and the rotated key (R values) of every position, int8 in groups of 32
with a float16 scale: the rounding that every activation gets in front of a product. They stand in the packed layout
twice, because attention is two products: once with positions as rows, for the scores, and once with channels as rows,
for the weighted sums. That is 1,156 bytes a position and layer at full size, as much as float16 rows would take. The
whole context is reserved as untouched virtual memory; only positions that were written take room.

Dimension key:  L layers   S positions   C latent   R rope
"""

import numpy as np

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime import kernels


class LatentCache:
    """Room for `context` positions, of which the first `n` are filled."""

    def __init__(self, config: TextConfig, context: int) -> None:
        self.context, self.n = context, 0
        C, R = config.kv_rank, config.rope_dim
        # np.zeros maps pages that the system provides on first touch.
        rows, columns = (
            np.zeros((config.n_layers, size), np.uint8) for size in kernels.latent_cache_bytes(context, C, R)
        )
        self.layers = [
            kernels.latent_cache(rows[i], columns[i], context, C, R) for i in range(config.n_layers)
        ]

    def rewind(self, n: int) -> None:
        """Forget all positions from n on."""
        assert 0 <= n <= self.n, f"rewind to {n} of {self.n} positions"
        self.n = n

    @staticmethod
    def bytes_per_token(config: TextConfig) -> int:
        """Over many positions; memory comes in whole groups."""
        many = 1 << 20
        return (
            config.n_layers * sum(kernels.latent_cache_bytes(many, config.kv_rank, config.rope_dim)) // many
        )
