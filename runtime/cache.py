"""The latent cache: what attention remembers of every position, and nothing else.

Per layer, the normalised latent (C values) and the rotated key (R values) of every position, int8 in groups of 32
with a float16 scale: the rounding that every activation gets in front of a product. They stand in the packed layout
twice, because attention is two products: once with positions as rows, for the scores, and once with channels as rows,
for the weighted sums. That is 1,156 bytes a position and layer at full size, as much as float16 rows would take. The
whole context is reserved as untouched virtual memory; only positions that were written take room, in small pages:
each channel block's columns are a run as long as the context, so with pages of 2 MB a few words would touch most of it.

Dimension key:  L layers   S positions   C latent   R rope
"""

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError
from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime import kernels

BLOCK = 16  # positions of a row block


class LatentCache:
    """Room for `context` positions, of which the first `n` are filled."""

    def __init__(self, config: TextConfig, context: int) -> None:
        """Raises DoesNotFitError where the system does not even reserve that much."""
        self.context, self.n = context, 0
        C, R = config.kv_rank, config.rope_dim
        sizes = kernels.latent_cache_bytes(context, C, R)
        try:
            rows, columns = (_reserved(config.n_layers * size).reshape(-1, size) for size in sizes)
        except OSError as error:
            raise DoesNotFitError(
                f"a context of {context} tokens needs {config.n_layers * sum(sizes) / 1e9:.1f} GB of memory, which the system "
                f"does not give ({error.strerror}); ask for a shorter one with --context"
            ) from error
        self._rows = rows
        self._block_bytes = kernels.latent_cache_bytes(BLOCK, C, R)[0]
        self.layers = [
            kernels.latent_cache(rows[i], columns[i], context, C, R) for i in range(config.n_layers)
        ]

    def rewind(self, n: int) -> None:
        """Forget all positions from n on."""
        assert 0 <= n <= self.n, f"rewind to {n} of {self.n} positions"
        self.n = n

    def rows(self, first: int, end: int) -> list[NDArray[np.uint8]]:
        """Of each layer, the row blocks of 16 positions that hold the positions first..end, as they lie."""
        where = slice(first // BLOCK * self._block_bytes, -(-end // BLOCK) * self._block_bytes)
        return [rows[where] for rows in self._rows]

    def adopt(self, first: int, end: int) -> None:
        """The rows of first..end have been filled from elsewhere; they are the last positions now."""
        for layer in self.layers:
            kernels.turn_columns(layer, first, end)
        self.n = end

    @staticmethod
    def bytes_per_token(config: TextConfig) -> int:
        """Over many positions; memory comes in whole groups."""
        many = 1 << 20
        return (
            config.n_layers * sum(kernels.latent_cache_bytes(many, config.kv_rank, config.rope_dim)) // many
        )


def _reserved(n_bytes: int) -> NDArray[np.uint8]:
    """Zeros in pages that the system provides on first touch, and not in huge ones, for which numpy would ask."""
    private: dict[str, Any] = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    area = mmap.mmap(-1, n_bytes, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, np.uint8)
