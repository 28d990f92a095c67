"""The latent cache: what attention remembers of every position, and nothing else.

Per layer and position, the normalised latent (C values) and the rotated key (R values) in float16: 1,152 bytes at
full size, 31 kB over 27 layers. The whole context is reserved as untouched virtual memory; only positions that were
written take room.

Dimension key:  L layers   S positions   C latent   R rope
"""

import numpy as np

from kimi_lite.formats.config import TextConfig


class LatentCache:
    """Room for `context` positions, of which the first `n` are filled."""

    def __init__(self, config: TextConfig, context: int) -> None:
        self.context, self.n = context, 0
        # np.zeros maps pages that the system provides on first touch.
        self.latent_LSC = np.zeros((config.n_layers, context, config.kv_rank), np.float16)
        self.key_LSR = np.zeros((config.n_layers, context, config.rope_dim), np.float16)

    def rewind(self, n: int) -> None:
        """Forget all positions from n on."""
        assert 0 <= n <= self.n, f"rewind to {n} of {self.n} positions"
        self.n = n

    @staticmethod
    def bytes_per_token(config: TextConfig) -> int:
        return 2 * config.n_layers * (config.kv_rank + config.rope_dim)
