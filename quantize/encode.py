"""Rounding weights to blocks: our q4g32 and q8g32, and ggml's types through the gguf package.

    q4g32   scale = m / c, stored as float16; q = round(w / scale) + 8, clipped to 0…15; w ~ scale · (q - 8)
    q8g32   scale = absmax / 127, stored as float16; q = round(w / scale), clipped to ±127

m is the group's value of largest magnitude, with its sign, so that it falls on the end of the grid that has eight
steps. Of three divisors c the one with the smallest squared error wins: -8 keeps m exact, -8.8 trades m for finer
steps, -7.2 the other way. On normal values that lowers the error from 8.6 to 8.3 % of the weights' size; sixteen
divisors would reach 8.1 % (benchmarks/results/2026-11-24-encode.jsonl).

Error: |w - scale · (q - 8)| <= scale / 2 wherever q is not clipped and the scale is a normal float16, because we
divide by the scale as stored.
"""

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.packed import GROUP, QUANTIZED, ROWS, pack_quantized

DIVISORS = (-8.0, -8.8, -7.2)
TILE_WEIGHTS = 1 << 20
LIMIT = 7 * 65504.0  # a larger weight would need a scale beyond float16


def encode(weight_OI: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """Rows in the stored form of a packed layout or ggml type, as a flat run of bytes.

    Packed layouts need whole row blocks: O a multiple of 16 unless these are a matrix's last rows.

    Raises:
        ModelFileError: a weight that is not finite, or beyond what a float16 scale can reach.
    """
    if kind in QUANTIZED:
        # A tile of whole row blocks at a time: the work in progress is several times as large as the weights.
        rows = max(ROWS, TILE_WEIGHTS // weight_OI.shape[1] // ROWS * ROWS)
        to_stored = quantize_q4g32 if kind == "q4g32" else quantize_q8g32
        tiles = (weight_OI[at : at + rows] for at in range(0, len(weight_OI), rows))
        return np.concatenate([pack_quantized(*to_stored(tile), kind) for tile in tiles])
    return np.asarray(quantize(weight_OI, GGMLQuantizationType[kind])).reshape(-1).view(np.uint8)


def _grouped(weight_OI: NDArray[np.float32]) -> NDArray[np.float32]:
    O, I = weight_OI.shape
    if I % GROUP:
        weight_OI = np.pad(weight_OI, ((0, 0), (0, -I % GROUP)))
    if not np.abs(weight_OI).max() <= LIMIT:  # also false for NaN
        raise ModelFileError(
            f"a weight is {weight_OI[np.abs(weight_OI) > LIMIT][:1] or 'NaN'}; the checkpoint is damaged"
        )
    return weight_OI.reshape(O, -1, GROUP)


def quantize_q4g32(weight_OI: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Stored values 0…15 int8 [O, I padded] and scales float16 [O, G]."""
    w_OGg = _grouped(weight_OI)
    O = len(w_OGg)
    at = np.abs(w_OGg).argmax(-1, keepdims=True)
    m_OG1 = np.take_along_axis(w_OGg, at, -1)
    best_q = best_scale = best_error = None
    for divisor in DIVISORS:
        scale = (m_OG1 / np.float32(divisor)).astype(np.float16)
        step = scale.astype(np.float32)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
        q = w_OGg * inverse
        np.rint(q, out=q)
        np.clip(q, -8, 7, out=q)
        difference = q * step
        difference -= w_OGg
        error = np.einsum("ogk,ogk->og", difference, difference)[..., None]
        if best_q is None or best_scale is None or best_error is None:
            best_q, best_scale, best_error = q, scale, error
            continue
        better = error < best_error
        np.copyto(best_q, q, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_error, error, where=better)
    assert best_q is not None
    assert best_scale is not None
    best_q += 8
    return best_q.astype(np.int8).reshape(O, -1), best_scale[..., 0]


def quantize_q8g32(weight_OI: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Stored values -127…127 int8 [O, I padded] and scales float16 [O, G]."""
    w_OGg = _grouped(weight_OI)
    scale_OG1 = (np.abs(w_OGg).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    step = scale_OG1.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    q = np.clip(np.rint(w_OGg * inverse), -127, 127).astype(np.int8)
    return q.reshape(len(q), -1), scale_OG1[..., 0]
