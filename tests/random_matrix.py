"""Packed matrices of random steps and scales, for the kernels of CPU and card alike."""

import numpy as np

from kimi_lite.formats.packed import pack_quantized
from kimi_lite.runtime.kernels import Matrix


def packed(rng: np.random.Generator, layout: str, O: int, I: int, count: int = 1) -> Matrix:
    low, high = (0, 16) if layout == "q4g32" else (-127, 128)
    data = [
        pack_quantized(
            rng.integers(low, high, (O, I)).astype(np.int8),
            rng.normal(0, 0.01, (O, I // 32)).astype(np.float16),
            layout,
        )
        for _ in range(count)
    ]
    return Matrix(layout, np.concatenate(data), O, I, count)
