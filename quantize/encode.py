"""Rounding weights to blocks: our q4b32, q3b32 and q8g32, and ggml's types through the gguf package.

    q4b32   scale near m / -8, one byte; q = round(w / scale) + 8, clipped to 0…15; w ~ scale · (q - 8)
    q3b32   the same in even q: 0, 2 … 14
    q8g32   scale = absmax / 127, stored as float16; q = round(w / scale), clipped to ±127

m is the group's value of largest magnitude, with its sign, so that it falls on the longer end of the grid. A byte's
scales are 7 to 12 % apart. Of four around |m| / 8 the one with the smallest squared error wins: a smaller one trades m for
finer steps, and the fewer steps there are, the smaller it should be. On normal values four bits leave 8.3 % of the weights'
size, as much as the best of three float16 scales did; sixteen of those reached 8.1 % (benchmarks/results/*-encode.jsonl).

Error: |w - scale · (q - 8)| <= step / 2 wherever q is not clipped, because we divide by the scale as stored; a step is the
scale, or twice that.

`stored` gives rows of a checkpoint's matrix in the form that a file holds: those that are in 4 bits already as they are, all
others rounded. `to_nearest` rounds each weight by itself; `calibrated` rounds a matrix for the inputs that it gets (GPTQ, Frantar et al.
2022, in the form of LDLQ, Chee et al. 2023), which quantize/calibrate.py finds.
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.packed import GROUP, LEAST_EXPONENT, ROWS, pack_quantized, scale_values
from kimi_lite.quantize.plan import Source

TILE_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Grid:
    """The weights that a layout with scales of one byte holds: q - 8 from -8 to 7 times the scale, all or the even ones."""

    every: int  # q's steps: 1 or 2
    choices: tuple[int, ...]  # scales that are tried, counted in bytes from the first that reaches |m| / 8

    @property
    def ends(self) -> tuple[int, int]:
        """In steps of `every` scales."""
        return -8 // self.every, 7 // self.every


GRIDS = {"q4b32": Grid(1, (-2, -1, 0, 1)), "q3b32": Grid(2, (-6, -4, -2, 0))}
SCALES = scale_values(np.arange(256, dtype=np.uint8)).astype(np.float32)  # of each byte
# A larger weight would need a larger scale than there is.
LIMITS = {"q4b32": 15.0, "q3b32": 15.0, "q8g32": 127 * 65504.0}


def stored(source: Source, kind: str, start: int = 0, n: int | None = None) -> NDArray[np.uint8]:
    """Rows start…start+n-1 of a source as `encode` gives them, but without rounding where the checkpoint holds them in 4 bits
    and the type can too.

    Raises:
        ModelFileError: as `encode`.
    """
    n = source.rows - start if n is None else n
    if source.int4 is None or kind not in ("q4g32", "Q4_0"):
        return encode(np.ascontiguousarray(source.read(start, n)), kind)
    q_nI, scale_ng = source.int4.quantized(start, n)
    with np.errstate(over="ignore"):
        half_ng = scale_ng.astype(np.float16)
    if not np.isfinite(half_ng).all():
        raise ModelFileError("a scale is too large for float16; the checkpoint is damaged")
    q_nI += 8
    if kind == "q4g32":
        return pack_quantized(q_nI, half_ng, kind)
    halves = q_nI.view(np.uint8).reshape(n, -1, 2, GROUP // 2)
    blocks = [half_ng[..., None].view(np.uint8), halves[:, :, 0] | halves[:, :, 1] << 4]
    return np.concatenate(blocks, axis=-1).reshape(-1)


def encode(weight_OI: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """Rows in the stored form of a packed layout or ggml type, as a flat run of bytes.

    Packed layouts need whole row blocks: O a multiple of 16 unless these are a matrix's last rows.

    Raises:
        ModelFileError: a weight that is not finite, or beyond what the layout's largest scale can reach.
    """
    if kind in LIMITS:
        # A tile of whole row blocks at a time: the work in progress is several times as large as the weights.
        rows = max(ROWS, TILE_WEIGHTS // weight_OI.shape[1] // ROWS * ROWS)
        tiles = (weight_OI[at : at + rows] for at in range(0, len(weight_OI), rows))
        return np.concatenate([pack_quantized(*to_nearest(tile, kind), kind) for tile in tiles])
    return np.asarray(quantize(weight_OI, GGMLQuantizationType[kind])).reshape(-1).view(np.uint8)


def to_nearest(weight_OI: NDArray[np.float32], kind: str) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Stored values int8 [O, I padded] of one of our layouts, and scales float16 [O, G]."""
    return _bytes_nearest(weight_OI, kind) if kind in GRIDS else _q8_nearest(weight_OI)


def _grouped(weight_OI: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    O, I = weight_OI.shape
    if I % GROUP:
        weight_OI = np.pad(weight_OI, ((0, 0), (0, -I % GROUP)))
    largest = np.abs(weight_OI).max()
    if not np.isfinite(largest):
        raise ModelFileError("a weight is not a finite number; the checkpoint is damaged")
    if largest > LIMITS[kind]:
        raise ModelFileError(
            f"a weight is {largest:g} in size, and {kind} holds weights up to {LIMITS[kind]:g}; "
            "if the checkpoint is right, quantize it with --to q8_0 or --to q4_0"
        )
    return weight_OI.reshape(O, -1, GROUP)


def _choices(m: NDArray[np.float32], grid: Grid) -> NDArray[np.int_]:
    """Scales to try, as bytes, for groups whose values of largest magnitude are m: [choices, *m.shape]."""
    # Bytes without their sign have the order of their values, and so have a float's bits, of which they are the upper ones.
    bits = (np.abs(m) / np.float32(8)).view(np.int32)
    first = ((bits + 0xFFFFF) >> 20) - ((127 + LEAST_EXPONENT) << 3)
    sign = np.where(m > 0, 128, 0)
    return np.stack([np.clip(first + choice, 0, 127) | sign for choice in grid.choices])


def _bytes_nearest(weight_OI: NDArray[np.float32], kind: str) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Scales are of those that a byte holds."""
    w_OGg, grid = _grouped(weight_OI, kind), GRIDS[kind]
    at = np.abs(w_OGg).argmax(-1, keepdims=True)
    choices_cOG1 = _choices(np.take_along_axis(w_OGg, at, -1), grid)
    q = np.empty_like(w_OGg)

    def steps(stored: NDArray[np.int_]) -> NDArray[np.float32]:
        """The steps; `q` becomes the weights in whole steps."""
        step = SCALES[stored] * np.float32(grid.every)
        np.divide(w_OGg, step, out=q)
        np.rint(q, out=q)
        np.clip(q, *grid.ends, out=q)
        return step

    best, best_error = choices_cOG1[0], np.full(at.shape, np.inf, np.float32)
    for stored in choices_cOG1:
        step = steps(stored)
        np.multiply(q, step, out=q)
        np.subtract(q, w_OGg, out=q)
        error = np.einsum("ogk,ogk->og", q, q)[..., None]
        best = np.where(error < best_error, stored, best)
        best_error = np.minimum(error, best_error)
    steps(best)
    np.multiply(q, grid.every, out=q)
    np.add(q, 8, out=q)
    return q.astype(np.int8).reshape(len(w_OGg), -1), SCALES[best][..., 0].astype(np.float16)


def calibrated(
    weight_OI: NDArray[np.float32], kind: str, u_II: NDArray[np.float32], d_I: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """As `to_nearest`, but rounded for the inputs x that the matrix gets, whose sum of x x' is U D U' (`triangular`).

    What counts is the error E of the weights as the products show it, E U D U' E': the sum over channels k of
    D_k (E_k + sum over j < k of E_j U_jk)^2. So a channel is rounded after what the channels before it leave to be made up
    for is added to it, and a group's scale is the one with which that sum comes out least.
    """
    O, grid = len(weight_OI), GRIDS[kind]
    w_IO = np.ascontiguousarray(_grouped(weight_OI, kind).reshape(O, -1).T)
    e_IO, q_IO = np.empty_like(w_IO), np.empty(w_IO.shape, np.int8)
    scale_GO = np.empty((len(w_IO) // GROUP, O), np.float16)
    for g, first in enumerate(range(0, len(w_IO), GROUP)):
        group = slice(first, first + GROUP)
        w_kO, u_kk, d_k = w_IO[group], u_II[group, group], d_I[group]
        target_kO = w_kO + u_II[:first, group].T @ e_IO[:first]
        largest_1O = np.take_along_axis(target_kO, np.abs(target_kO).argmax(0)[None], 0)
        scale_cO = SCALES[_choices(largest_1O[0], grid)]
        step_cO = scale_cO * np.float32(grid.every)
        rest_kcO = np.repeat(target_kO[:, None], len(grid.choices), 1)
        q_kcO, error_cO = np.empty_like(rest_kcO), np.zeros_like(step_cO)
        for k in range(GROUP):
            q_cO = np.clip(np.rint(rest_kcO[k] / step_cO), *grid.ends, out=q_kcO[k])
            value_cO = q_cO * step_cO
            error_cO += d_k[k] * (rest_kcO[k] - value_cO) ** 2
            rest_kcO[k + 1 :] += u_kk[k, k + 1 :, None, None] * (w_kO[k] - value_cO)
        best_1O = error_cO.argmin(0)[None]
        best_kO = np.take_along_axis(q_kcO, best_1O[None], 1)[:, 0]
        e_IO[group] = w_kO - best_kO * np.take_along_axis(step_cO, best_1O, 0)
        q_IO[group] = best_kO * grid.every + 8
        scale_GO[g] = np.take_along_axis(scale_cO, best_1O, 0)[0]
    return np.ascontiguousarray(q_IO.T), np.ascontiguousarray(scale_GO.T)


def triangular(moments_II: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """U, upper triangular with ones on its diagonal, and D with moments = U diag(D) U'; padding channels stand alone.

    Raises:
        LinAlgError: the moments are not positive definite.
    """
    n = len(moments_II)
    m_II = np.eye(-(-n // GROUP) * GROUP, dtype=np.float32)
    m_II[:n, :n] = moments_II
    u_II = np.linalg.cholesky(m_II[::-1, ::-1])[::-1, ::-1]
    diagonal_I = np.diagonal(u_II).copy()
    return np.ascontiguousarray(u_II / diagonal_I), diagonal_I**2


def _q8_nearest(weight_OI: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    w_OGg = _grouped(weight_OI, "q8g32")
    scale_OG1 = (np.abs(w_OGg).max(-1, keepdims=True) / np.float32(127)).astype(np.float16)
    step = scale_OG1.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    q = np.clip(np.rint(w_OGg * inverse), -127, 127).astype(np.int8)
    return q.reshape(len(q), -1), scale_OG1[..., 0]
