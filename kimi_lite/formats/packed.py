"""The packed layouts: weight matrices stored as the kernels read them.

A matrix W [O, I] is cut into row blocks of 16 rows and groups of 32 input channels. For each row block, for each group
in order, there is one run of bytes: the weights in lines of 64 bytes, then the 16 rows' scales. In a line, four
consecutive channels of row 0 stand first, then the same channels of row 1, and so on: one 64-byte load feeds 16 rows,
and one broadcast of four activations feeds them all.

    q4b32   w = scale · (q - 8), q in 0…15    4 lines, 272 bytes a run   4.25 bits a weight, scales of one byte
            line j, byte 4r + c: low nibble channel 8j + c of row r, high nibble channel 8j + 4 + c
    q3b32   w = scale · (q - 8), q even       3 lines, 208 bytes a run   3.25 bits a weight, scales of one byte
            u = q / 2, 0…7; line t, byte 4r + c: bits 1-3 are u of channel 8t + c, bits 5-7 of channel 8t + 4 + c of row r;
            bits 0 of the three lines are u of channel 24 + c, lowest first, bits 4 of channel 28 + c
    q8g32   w = scale · q, q in -127…127      8 lines, 544 bytes a run   8.5 bits a weight, float16 scales
            line j, byte 4r + c: channel 4j + c of row r

A scale of one byte is a sign, four bits e and three bits m, and stands for ±(1 + m / 8) · 2^(e - 15).

Five more hold what a standard GGUF holds, bit for bit, so that its weights run at the same speed: q4g32 (Q4_0: q4b32 with
float16 scales, 288 bytes), q5g32 (Q5_0), i4g32 (IQ4_NL), and q4k and q6k (Q4_K and Q6_K), whose scales are shared by 256
channels. Q8_0 is q8g32. The kernels' module packs them.

Rows are padded to a multiple of 16 and channels to a multiple of 32 with weights of 0. An MLP is one run of
bytes as well: gate's and up's row blocks in turn, then down's, padded to whole pages, so that one copy moves it and
one advice prefetches it. Specification: docs/formats.md.

Dimension key:  O out_features   I in_features   G groups, I / 32   B row blocks, O / 16   F MLP width   D model width
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 16
GROUP = 32
PAGE = 4096  # an MLP run begins on such a boundary


@dataclass(frozen=True, slots=True)
class Layout:
    """One packed layout. `run_bytes` is what 16 rows × 32 channels take, scales included."""

    name: str
    bits: int
    run_bytes: int
    zero: int = 0  # the stored value that means weight 0, in those that quantize writes
    scale_bytes: int = 2  # a scale, in those: one byte, or a float16

    @property
    def weight_bytes(self) -> int:
        """Of a run in one of QUANTIZED: where its scales begin."""
        return ROWS * GROUP * self.bits // 8

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.run_bytes / (ROWS * GROUP)


LAYOUTS = {
    "q4b32": Layout("q4b32", 4, 272, 8, 1),
    "q3b32": Layout("q3b32", 3, 208, 8, 1),
    "q4g32": Layout("q4g32", 4, 288, 8),
    "q8g32": Layout("q8g32", 8, 544, 0),
    "q5g32": Layout("q5g32", 5, 352),
    "i4g32": Layout("i4g32", 4, 288),
    "q4k": Layout("q4k", 4, 296),
    "q6k": Layout("q6k", 6, 420),
}
QUANTIZED = ("q4b32", "q3b32", "q4g32", "q8g32")  # those that pack_quantized writes


def groups(in_features: int) -> int:
    """G: groups of 32 that hold this many channels."""
    return -(-in_features // GROUP)


def row_block_bytes(layout: str, in_features: int) -> int:
    """Bytes of one row block."""
    return groups(in_features) * LAYOUTS[layout].run_bytes


def matrix_bytes(layout: str, out_features: int, in_features: int) -> int:
    """Bytes of a whole packed matrix."""
    return -(-out_features // ROWS) * row_block_bytes(layout, in_features)


def mlp_bytes(layout: str, width: int, model_width: int) -> int:
    """Bytes of one packed MLP: gate and up [F, D], down [D, F], padded to whole pages."""
    size = 2 * matrix_bytes(layout, width, model_width) + matrix_bytes(layout, model_width, width)
    return -(-size // PAGE) * PAGE


LEAST_EXPONENT = -15  # of a scale of one byte


def scale_values(stored: NDArray[np.uint8]) -> NDArray[np.float16]:
    """What scales of one byte stand for; of either sign, from 2^-15 to 1.875, and each a float16."""
    e, m = (stored >> 3 & 15).astype(np.int32), (stored & 7).astype(np.float32)
    size = np.ldexp(1 + m / 8, e + LEAST_EXPONENT)
    return np.where(stored & 128, -size, size).astype(np.float16)


def scale_bytes(scale: NDArray[np.float16]) -> NDArray[np.uint8]:
    """The inverse of `scale_values`; a value that no byte stands for is a mistake of the caller's."""
    fraction, exponent = np.frexp(np.abs(scale.astype(np.float32)))  # 0.5 ≤ fraction < 1
    e, m = exponent - 1 - LEAST_EXPONENT, (16 * fraction - 8).astype(np.int32)
    stored = (e << 3 | m | np.where(scale < 0, 128, 0)).astype(np.uint8)
    assert np.array_equal(scale_values(stored), scale), "scales that a byte does not hold"
    return stored


def pack_quantized(q_OI: NDArray[np.int8], scale_OG: NDArray[np.float16], layout: str) -> NDArray[np.uint8]:
    """Interleave stored values (3 bits: 0, 2 … 14, 4 bits: 0…15, 8 bits: -127…127) and their scales, which are of those
    that a byte holds where the layout has scales of one byte. Returns uint8 [matrix_bytes]."""
    form, (O, I) = LAYOUTS[layout], q_OI.shape
    B, G = -(-O // ROWS), groups(I)
    assert scale_OG.shape == (O, G), f"scales {scale_OG.shape} for a matrix of {q_OI.shape}"
    padded = np.full((B * ROWS, G * GROUP), form.zero, np.uint8)
    padded[:O, :I] = q_OI.view(np.uint8)
    stored_OG = scale_OG if form.scale_bytes == 2 else scale_bytes(scale_OG)
    scales = np.zeros(
        (B * ROWS, G), stored_OG.dtype
    )  # past the end: weights are 0 by their scale, or by q = 8
    scales[:O] = stored_OG
    out = np.empty((B, G, form.run_bytes), np.uint8)
    blocks = padded.reshape(B, ROWS, G, GROUP).transpose(0, 2, 1, 3)  # [B, G, 16, 32]
    if form.bits == 3:
        parts = blocks.reshape(B, G, ROWS, 8, 4)  # of u doubled, in bits 1-3
        rest = parts[..., 6, :] >> 1 | parts[..., 7, :] << 3  # bits 0-2 and 4-6
        both = np.stack(
            [parts[..., 2 * t, :] | parts[..., 2 * t + 1, :] << 4 | rest >> t & 0x11 for t in range(3)],
            axis=3,
        )
    elif form.bits == 4:
        lines = blocks.reshape(B, G, ROWS, 4, 2, 4)  # row, line, low or high, channel
        both = lines[..., 0, :] | (lines[..., 1, :] << 4)
    else:
        both = blocks.reshape(B, G, ROWS, 8, 4)
    n_weight_bytes = form.weight_bytes
    out[..., :n_weight_bytes] = both.transpose(0, 1, 3, 2, 4).reshape(B, G, n_weight_bytes)
    out[..., n_weight_bytes:] = (
        np.ascontiguousarray(scales.reshape(B, ROWS, G).transpose(0, 2, 1)).view(np.uint8).reshape(B, G, -1)
    )
    return out.reshape(-1)


def unpack_quantized(
    data: NDArray[np.uint8], layout: str, out_features: int, in_features: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """The inverse of `pack_quantized`: stored values int8 [O, I] and scales float16 [O, G]."""
    form = LAYOUTS[layout]
    B, G = -(-out_features // ROWS), groups(in_features)
    runs = data[: matrix_bytes(layout, out_features, in_features)].reshape(B, G, form.run_bytes)
    n_weight_bytes = form.weight_bytes
    lines = (
        runs[..., :n_weight_bytes].reshape(B, G, -1, ROWS, 4).transpose(0, 1, 3, 2, 4)
    )  # [B, G, 16, lines, 4]
    if form.bits == 3:
        rest = sum((lines[..., t, :] & 0x11) << t for t in range(3))
        parts = [part for t in range(3) for part in (lines[..., t, :] & 0x0E, lines[..., t, :] >> 4 & 0x0E)]
        values = np.stack([*parts, rest << 1 & 0x0E, rest >> 3 & 0x0E], axis=3)
    else:
        values = np.stack([lines & 15, lines >> 4], axis=-2) if form.bits == 4 else lines
    q_OI = values.reshape(B, G, ROWS, GROUP).transpose(0, 2, 1, 3).reshape(B * ROWS, G * GROUP)
    stored = np.ascontiguousarray(runs[..., n_weight_bytes:])
    scales = stored.view(np.float16) if form.scale_bytes == 2 else scale_values(stored)  # [B, G, 16]
    scale_OG = scales.transpose(0, 2, 1).reshape(B * ROWS, G)
    return q_OI[:out_features, :in_features].view(np.int8), scale_OG[:out_features]


def unpack(data: NDArray[np.uint8], layout: str, out_features: int, in_features: int) -> NDArray[np.float32]:
    """The weights that a packed matrix stands for, float32 [O, I]."""
    return weights_of(*unpack_quantized(data, layout, out_features, in_features), layout)


def weights_of(q_OI: NDArray[np.int8], scale_OG: NDArray[np.float16], layout: str) -> NDArray[np.float32]:
    """The weights that stored values and their scales stand for, float32 [O, I]."""
    scale_OI = np.repeat(scale_OG.astype(np.float32), GROUP, axis=1)[:, : q_OI.shape[1]]
    return scale_OI * (q_OI.astype(np.float32) - np.float32(LAYOUTS[layout].zero))


def join_mlp(
    gate: NDArray[np.uint8], up: NDArray[np.uint8], down: NDArray[np.uint8], layout: str, D: int
) -> NDArray[np.uint8]:
    """One MLP's run of bytes from its three packed matrices; D is the model width."""
    block = row_block_bytes(layout, D)
    out = np.zeros(-(-(gate.size + up.size + down.size) // PAGE) * PAGE, np.uint8)
    pairs = out[: gate.size + up.size].reshape(-1, 2, block)
    pairs[:, 0], pairs[:, 1] = gate.reshape(-1, block), up.reshape(-1, block)
    out[gate.size + up.size :][: down.size] = down
    return out


def split_mlp(data: NDArray[np.uint8], layout: str, F: int, D: int) -> tuple[NDArray[np.uint8], ...]:
    """The inverse of `join_mlp`: packed gate, up and down."""
    size, block = matrix_bytes(layout, F, D), row_block_bytes(layout, D)
    pairs = data[: 2 * size].reshape(-1, 2, block)
    down = data[2 * size :][: matrix_bytes(layout, D, F)]
    return pairs[:, 0].reshape(-1), pairs[:, 1].reshape(-1), down
