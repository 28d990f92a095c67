"""The image tower on a card: what lies where, and which kernel over which grid.

The tower goes through the card part by part: the patch projection, each block, the projector. Where there is room, all
parts stay; else each is uploaded in its turn into the place of the one before, which costs its bytes over PCIe and no more
room than the largest part. All other memory is taken for one encode and given back at its end.

Rows are worked on in pieces, as on the CPU (vision.py), only longer ones. The kernels are in vision.cu, the products in
products.cu.

Dimension key:  P patches   W tower width   H heads   K = W / H   F MLP width   M image tokens   D text width   L blocks
                X values of a patch, padded   R rows of a piece
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import VisionConfig
from kimi_lite.formats.packed import matrix_bytes, row_block_bytes
from kimi_lite.runtime import image
from kimi_lite.runtime.cuda import halves
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.halves import NO_MATRIX
from kimi_lite.runtime.cuda.program import Matrix, Patches, Rows
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.vision import (
    LAYOUT,
    LN_EPS,
    Linear,
    Norm,
    Progress,
    VisionWeights,
    calls_of,
    padded,
    patch_angles,
    position_rows,
)

Q8 = 1  # kQ8 of products.cu, the form of LAYOUT
MOST_ROWS = 1024  # of a piece: two rows of the longest picture's patches, for 2 × 2 of them make a token
KEYS, QUERIES = 128, 32  # kKeys and kQueries of vision.cu
THREADS = 128
NO_ROWS = Rows(0, 0, 0, 0)


@dataclass(frozen=True)
class TowerShape:
    """An image tower's dimensions, and from them its sizes."""

    W: int
    H: int
    F: int
    L: int
    D: int
    X: int

    @classmethod
    def of(cls, config: VisionConfig, text_width: int) -> "TowerShape":
        values = padded(3 * config.patch_size**2)
        return cls(config.hidden_size, config.n_heads, config.ffn_size, config.n_layers, text_width, values)

    @property
    def K(self) -> int:
        return self.W // self.H

    @property
    def part_bytes(self) -> list[int]:
        """Of the patch projection, each block and the projector."""
        W, F, D = self.W, self.F, self.D
        embed = {"patch": 4 * W * self.X, "patch.bias": 4 * W}
        block = _norm_sizes("norm0", W) | _linear_sizes("qkv", 3 * W, W) | _linear_sizes("out", W, W)
        block |= _norm_sizes("norm1", W) | _linear_sizes("fc0", F, W) | _linear_sizes("fc1", W, F)
        last = _norm_sizes("final", W) | _norm_sizes("pre", W)
        last |= _linear_sizes("linear_1", 4 * W, 4 * W) | _linear_sizes("linear_2", D, 4 * W)
        sizes = [halves.laid_out(part)[1] for part in (embed, block, last)]
        return [sizes[0], *[sizes[1]] * self.L, sizes[2]]

    @property
    def bytes(self) -> int:
        """Of all parts, for them to stay."""
        return sum(self.part_bytes)

    @property
    def block_macs(self) -> int:
        """8-bit products of a patch in one block."""
        return 4 * self.W * self.W + 2 * self.W * self.F

    @property
    def projector_macs(self) -> int:
        """8-bit products of a patch in the projector, which takes four at once."""
        return self.W * (4 * self.W + self.D)

    @property
    def pair_macs(self) -> int:
        """16-bit products of a patch and one that it looks at, in one block."""
        return self.H * (self.K + _whole(self.K, 16))


def _norm_sizes(name: str, W: int) -> dict[str, int]:
    return {name: 4 * W, f"{name}.bias": 4 * W}


def _linear_sizes(name: str, rows: int, columns: int) -> dict[str, int]:
    return {name: matrix_bytes(LAYOUT, rows, columns), f"{name}.bias": 4 * rows}


class TowerBuffers:
    """What an encode of pictures needs beside the tower: names, offsets and sizes."""

    def __init__(self, s: TowerShape, sizes: Sequence[int]) -> None:
        """`sizes` are the pictures', in patches."""
        P = sum(sizes)
        R = self.R = min(MOST_ROWS, _whole(P, KEYS))
        wide = max(R * max(3 * s.W, s.F, s.X), R // 4 * s.D)
        # Quantized rows of the tower, of its MLP and of four patches side by side: values, scales and sums.
        rows = max(R * padded(s.W), R * padded(s.F), R // 4 * padded(4 * s.W))
        parts = {
            "x": 4 * P * s.W,
            "cos": 2 * P * s.K,
            "sin": 2 * P * s.K,
            "wide": 4 * wide,
            "narrow": 4 * max(R * s.W, R // 4 * s.D),
            "rows": rows + rows // 4,
        }
        for i, N in enumerate(sizes):
            Np, Kp = _whole(N, KEYS), _whole(s.K, 16)
            store = {
                "q": 2 * s.H * N * s.K,
                "k": 2 * s.H * Np * s.K,
                "v": 2 * s.H * Np * Kp,
                "q_scale": 4 * s.H * N,
                "k_scale": 4 * s.H * Np,
                "v_scale": 4 * s.H * (Np // KEYS) * Kp,
            }
            parts |= {f"{name} {i}": size for name, size in store.items()}
        self.offsets, self.n_bytes = halves.laid_out(parts)


def room_for(s: TowerShape, sizes: Sequence[int], *, resident: bool) -> int:
    """Bytes that an encode takes: its buffers, and the largest part where the tower is not there."""
    return TowerBuffers(s, sizes).n_bytes + (0 if resident else max(s.part_bytes))


Part = Mapping[str, Norm | Linear]


def parts_of(weights: VisionWeights) -> list[Part]:
    """The parts of a tower, in the order of their use. Raises UsageError for one that no GPU kernel runs."""
    last: Part = {
        "final": weights.final_norm,
        "pre": weights.pre_norm,
        "linear_1": weights.linear_1,
        "linear_2": weights.linear_2,
    }
    parts: list[Part] = [{"patch": weights.patch}, *(vars(block) for block in weights.blocks), last]
    for name, each in ((name, each) for part in parts[1:] for name, each in part.items()):
        if isinstance(each, Linear) and each.matrix.layout != LAYOUT:
            raise UsageError(
                f"the image tower's {name} has the layout {each.matrix.layout}, for which it has no GPU kernel, only for "
                f"{LAYOUT}"
            )
    return parts


class Tower:
    """An image tower on a card, there for good or passing through it."""

    def __init__(self, card: Card, weights: VisionWeights) -> None:
        """Takes no memory yet. Raises UsageError as `parts_of` does."""
        self.card, self.weights = card, weights
        self.shape = TowerShape.of(weights.config, weights.text_width)
        self.parts = parts_of(weights)
        self._base = 0  # where all parts lie, if they do

    def load(self) -> None:
        """Upload all parts, for good. Raises DeviceMemoryError; the tower then is as it was."""
        base = self.card.allocate(self.shape.bytes, "the image tower")
        at = base
        for part, size in zip(self.parts, self.shape.part_bytes, strict=True):
            self._upload(part, at)
            at += size
        self.card.synchronize()
        self._base = base

    def unload(self) -> None:
        """Give the memory of `load` back."""
        if self._base:
            self.card.free(self._base)
        self._base = 0

    def encode(
        self, canvases: Sequence[NDArray[np.uint8]], on_progress: Progress | None = None
    ) -> list[Float]:
        """What `vision.encode` gives, bit for bit. Raises DeviceMemoryError, nothing then being taken."""
        patch = self.weights.config.patch_size
        grids = [(pixels.shape[0] // patch, pixels.shape[1] // patch) for pixels in canvases]
        buffers = TowerBuffers(self.shape, [h * w for h, w in grids])
        passing = 0 if self._base else max(self.shape.part_bytes)
        base = self.card.allocate(
            passing + buffers.n_bytes, f"encoding pictures of {sum(h * w for h, w in grids)} patches"
        )
        try:
            return _Encode(self, buffers, base, base + passing, grids).run(canvases, on_progress)
        finally:
            self.card.free(base)

    def part(self, index: int, passing: int) -> dict[str, int]:
        """Addresses of a part's arrays: where it stays, or else at `passing`, to where it is uploaded."""
        if self._base:
            at = self._base + sum(self.shape.part_bytes[:index])
            sizes = {name: array.nbytes for name, array in _arrays(self.parts[index]).items()}
            return {name: at + offset for name, offset in halves.laid_out(sizes)[0].items()}
        return self._upload(self.parts[index], passing)

    def _upload(self, part: Part, base: int) -> dict[str, int]:
        arrays = _arrays(part)
        offsets, _ = halves.laid_out({name: array.nbytes for name, array in arrays.items()})
        for name, array in arrays.items():
            self.card.upload(base + offsets[name], array)
        return {name: base + offset for name, offset in offsets.items()}


def _arrays(part: Part) -> dict[str, NDArray[Any]]:
    arrays = dict[str, NDArray[Any]]()
    for name, each in part.items():
        arrays[name] = each.matrix.data if isinstance(each, Linear) else each.weight
        arrays[f"{name}.bias"] = each.bias
    return arrays


class _Encode:
    """Pictures on their way through the tower."""

    def __init__(
        self, tower: Tower, buffers: TowerBuffers, passing: int, base: int, grids: Sequence[tuple[int, int]]
    ) -> None:
        s = self.s = tower.shape
        self.tower, self.card, self.passing, self.grids, self.R = tower, tower.card, passing, grids, buffers.R
        self.at = {name: base + offset for name, offset in buffers.offsets.items()}
        self.starts = np.cumsum([0, *(h * w for h, w in grids)]).tolist()
        self.stores = [
            Patches(
                *(self.at[f"{name} {i}"] for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale")),
                h * w, s.H, s.K, _whole(h * w, KEYS), _whole(s.K, 16),
            )
            for i, (h, w) in enumerate(grids)
        ]  # fmt: skip
        self.card.clear(
            base, buffers.n_bytes
        )  # keys that are not there count for nothing, but are multiplied

    def run(self, canvases: Sequence[NDArray[np.uint8]], on_progress: Progress | None) -> list[Float]:
        part = self.tower.part(0, self.passing)
        for canvas, grid, start in zip(canvases, self.grids, self.starts, strict=False):
            self.embed(part, canvas, grid, start)
        L = self.s.L
        for i in range(L):
            self.block(self.tower.part(1 + i, self.passing))
            if on_progress:
                self.card.synchronize()
                on_progress((i + 1) / L)
        part = self.tower.part(L + 1, self.passing)
        return [self.project(part, grid, start) for grid, start in zip(self.grids, self.starts, strict=False)]

    def embed(
        self, part: Mapping[str, int], canvas: NDArray[np.uint8], grid: tuple[int, int], start: int
    ) -> None:
        """Patch projection plus the position table at this grid: the residual stream. Angles for what follows."""
        s, at, card, (h, w), weights = self.s, self.at, self.card, grid, self.tower.weights
        angles = patch_angles(grid, s.K)
        for name, table_PK in zip(("cos", "sin"), angles, strict=True):
            card.upload(at[name] + 2 * start * s.K, table_PK)
        places = position_rows(weights.positions_hwW, grid)
        step = self.R // w
        for first in range(0, h, step):
            n = min(step, h - first)
            strip = canvas[first * weights.config.patch_size : (first + n) * weights.config.patch_size]
            values_PX = np.zeros((n * w, s.X), np.float32)
            values_PX[:, : weights.patch.columns] = image.patches(strip, weights.image)
            places_PW = np.concatenate([next(places) for _ in range(n)])
            card.upload(at["wide"], values_PX)
            card.upload(at["narrow"], places_PW)
            card.launch(
                "embed_patches", (-(-s.W // 8), -(-n * w // 8)), THREADS, 0,
                part["patch"], at["wide"], s.X, s.W, n * w, at["narrow"], part["patch.bias"],
                self.x(start + first * w),
            )  # fmt: skip
            card.synchronize()  # the arrays go now

    def block(self, part: Mapping[str, int]) -> None:
        """x += attention(norm(x)), then x += mlp(norm(x))."""
        s, at, card = self.s, self.at, self.card
        calls = list(calls_of([h * w for h, w in self.grids], self.R))
        for call in calls:
            start, T = call[0].start, call[-1].stop - call[0].start
            self.norm(part, "norm0", self.x(start), T, rows=self.rows(T, s.W))
            self.product(part, "qkv", 3 * s.W, s.W, T)
            for piece in call:
                n, angle = piece.stop - piece.start, 2 * piece.start * s.K
                card.launch(
                    "place_patches", (s.H, -(-n // KEYS)), THREADS, 0,
                    self.stores[piece.picture], at["wide"] + 12 * (piece.start - start) * s.W, part["qkv.bias"],
                    at["cos"] + angle, at["sin"] + angle, piece.first, n,
                )  # fmt: skip
        for call in calls:
            start, T = call[0].start, call[-1].stop - call[0].start
            for piece in call:
                n = piece.stop - piece.start
                card.launch(
                    f"attend_patches_{5 if s.K <= 80 else 8}", (-(-n // QUERIES), s.H), THREADS, 2 * QUERIES * KEYS,
                    self.stores[piece.picture], piece.first, n, at["narrow"] + 4 * (piece.start - start) * s.W,
                )  # fmt: skip
            self.quantize(at["narrow"], T, s.W)
            self.product(part, "out", s.W, s.W, T)
            self.add(part, "out", s.W, T, self.x(start))
            self.norm(part, "norm1", self.x(start), T, rows=self.rows(T, s.W))
            self.product(part, "fc0", s.F, s.W, T)
            self.gelu(part, "fc0", at["wide"], s.F, T, exact=False)
            self.product(part, "fc1", s.W, s.F, T)
            self.add(part, "fc1", s.W, T, self.x(start))

    def project(self, part: Mapping[str, int], grid: tuple[int, int], start: int) -> Float:
        """The last norm, 2×2 patches side by side, and the projector: float32 [M, D]."""
        s, at, card, (h, w) = self.s, self.at, self.card, grid
        rows_MD = np.empty((h * w // 4, s.D), np.float32)
        step = self.R // (2 * w) * 2  # rows of patches, two for each of tokens
        for first in range(0, h, step):
            T = min(step, h - first) * w
            M = T // 4
            self.norm(part, "final", self.x(start + first * w), T, wide=w, out=at["narrow"])
            self.norm(part, "pre", at["narrow"], T, out=at["wide"])
            self.quantize(at["wide"], M, 4 * s.W)
            self.product(part, "linear_1", 4 * s.W, 4 * s.W, M)
            self.gelu(part, "linear_1", at["wide"], 4 * s.W, M, exact=True)
            self.product(part, "linear_2", s.D, 4 * s.W, M)
            card.clear(at["narrow"], 4 * M * s.D)
            self.add(part, "linear_2", s.D, M, at["narrow"])
            done = first * w // 4
            card.download(rows_MD[done : done + M], at["narrow"])
        card.synchronize()
        return rows_MD

    def x(self, row: int) -> int:
        """Where a row of the residual stream lies."""
        return self.at["x"] + 4 * row * self.s.W

    def rows(self, T: int, width: int) -> Rows:
        return halves.rows_at(self.at["rows"], T, padded(width))

    def norm(
        self,
        part: Mapping[str, int],
        name: str,
        x: int,
        T: int,
        *,
        wide: int = 0,
        out: int = 0,
        rows: Rows = NO_ROWS,
    ) -> None:
        """Rows of x, from picture order to token order if `wide` says how many patches a row has."""
        self.card.launch(
            "layer_norm", (-(-T // 4),), THREADS, 0,
            x, part[name], part[f"{name}.bias"], T, self.s.W, LN_EPS, wide, out, rows,
        )  # fmt: skip

    def product(self, part: Mapping[str, int], name: str, rows: int, columns: int, T: int) -> None:
        """`wide` [T, rows] = the quantized rows times a matrix."""
        X = padded(columns)
        matrix = Matrix(part[name], Q8, rows, X, row_block_bytes(LAYOUT, X))
        halves.product(self.card, matrix, NO_MATRIX, self.rows(T, columns), T, self.at["wide"], 0)

    def quantize(self, x: int, T: int, width: int) -> None:
        grid = (-(-padded(width) // THREADS), T)
        self.card.launch("quantize_rows", grid, THREADS, 0, x, width, self.rows(T, width))

    def gelu(self, part: Mapping[str, int], name: str, y: int, width: int, T: int, *, exact: bool) -> None:
        grid = (-(-padded(width) // THREADS), T)
        self.card.launch(
            "gelu_rows", grid, THREADS, 0, y, part[f"{name}.bias"], width, int(exact), self.rows(T, width)
        )

    def add(self, part: Mapping[str, int], name: str, width: int, T: int, x: int) -> None:
        """x += `wide` and the bias."""
        grid = (-(-width // THREADS), T)
        self.card.launch("add_bias", grid, THREADS, 0, self.at["wide"], part[f"{name}.bias"], width, x)


def _whole(n: int, unit: int) -> int:
    return -(-n // unit) * unit
