"""Random matrices, packed or in ggml blocks, for the kernels of CPU and card alike."""

import gguf
import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.packed import pack_quantized
from kimi_lite.runtime.kernels import Matrix


def packed(
    rng: np.random.Generator, layout: str, O: int, I: int, count: int = 1, size: float = 0.01
) -> Matrix:
    """`count` matrices with scales of about `size`."""
    low, high, step = {"q8g32": (-127, 128, 1), "q3b32": (0, 8, 2)}.get(layout, (0, 16, 1))
    data = [
        pack_quantized(
            (step * rng.integers(low, high, (O, I))).astype(np.int8),
            random_scales(rng, layout, (O, I // 32), size),
            layout,
        )
        for _ in range(count)
    ]
    return Matrix(layout, np.concatenate(data), O, I, count)


def random_scales(
    rng: np.random.Generator, layout: str, shape: tuple[int, ...], size: float
) -> NDArray[np.float16]:
    """Scales of both signs about so large, of those that the layout holds: bytes have three bits behind the leading one."""
    values = rng.normal(0, size, shape)
    if layout in ("q4b32", "q3b32"):
        fraction, exponent = np.frexp(np.clip(np.abs(values), 2.0**-15, 1.875))
        values = np.copysign(np.ldexp(np.floor(16 * fraction) / 16, exponent), values)
    return values.astype(np.float16)


def every_byte(layout: str) -> tuple[Matrix, NDArray[np.float32]]:
    """A matrix [16, 512] with each scale that a byte can hold, once, and all weights twice that; and its weights."""
    byte = np.arange(256)
    size = (1 + byte % 8 / 8) * 2.0 ** (byte // 8 % 16 - 15)
    scale_OG = (np.where(byte < 128, size, -size)).reshape(16, 16)
    data = pack_quantized(np.full((16, 512), 10, np.int8), scale_OG.astype(np.float16), layout)
    return Matrix(layout, data, 16, 512), np.repeat(2 * scale_OG, 32, 1).astype(np.float32)


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
