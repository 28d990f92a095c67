"""Random matrices, packed or in ggml blocks, for the kernels of CPU and card alike."""

import gguf
import numpy as np
from numpy.typing import NDArray

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


def random_blocks(rng: np.random.Generator, kind: str, O: int, I: int) -> NDArray[np.uint8]:
    """Valid blocks of any type: random bytes, with the float16 fields made small and finite."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (O * I // elements, size), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in halves:
        raw[:, at : at + 2] = (
            rng.uniform(0.001, 0.01, len(raw)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        )
    return raw.reshape(-1)
