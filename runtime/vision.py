"""The image side at run time: MoonViT, the 2×2 merge and the projector, straight down.

Weights are int8 in groups of 32 (q8g32), 0.48 GB at full size, so that every product runs on the integer kernels of the
text model. A packed file holds them so, behind the text model, and they are read where they lie; an mmproj file's are
packed when it is opened, to the same bits. The patch projection stays in float32, since a pixel is worth its eight
bits. Rows are worked on in pieces of 512, so that memory beside the weights grows with the picture only by the residual
stream and by 16-bit queries, keys and values.

Pictures of different sizes share the products and never see each other: each has keys and values of its own. A
picture gives the same bits alone or in company, on every instruction set and thread count; the finished rows are
rounded to float16, so that a cached copy is the result itself.

Dimension key:  P patches   W tower width   H heads   K = W / H   F MLP width   M image tokens   D text width
                X a width padded to whole groups of 32, or the values of a patch
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError, UsageError
from kimi_lite.formats.config import ImageConfig, VisionConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import GROUP, matrix_bytes
from kimi_lite.runtime import _kernels, image
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.kernels import Float, Matrix, linear
from kimi_lite.runtime.template import ImagePart
from kimi_lite.runtime.tensors import Tensors, of_image_side

if TYPE_CHECKING:
    from PIL.Image import Image

LN_EPS = 1e-5
ROPE_THETA = 10000.0
LAYOUT = "q8g32"  # of all matrices but the patch projection
POSITIONS = "v.position_embd.weight"
QKV = ("attn_q", "attn_k", "attn_v")
# A block's parts as a packed file names them, in Block's order.
BLOCK = ("ln1", "attn_qkv", "attn_out", "ln2", "ffn_up", "ffn_down")
ROWS = 512  # worked on at once: whole blocks of keys, and few enough to stay in the processor's cache
BATCH_ROWS = 4096  # of pictures that are encoded together
PACK_ROWS = 256  # rows of a matrix that are floats at one moment while it is packed
RESULT_VERSION = 2  # raised whenever the same picture may give other bits

Progress = Callable[[float], None]  # the share that is done


@dataclass(frozen=True, slots=True)
class EncodedImage(ImagePart):
    """A picture as the text model takes it; `digest` tells it from every other picture and size."""

    rows_MD: NDArray[np.float16]
    digest: str
    pixels: NDArray[np.uint8] | None = None  # [h, w, 3], the canvas that the tower saw


Place = tuple[EncodedImage, int] | None  # the picture and the row that an image token stands for


@dataclass(frozen=True)
class Linear:
    """A matrix and its bias."""

    matrix: Matrix  # its columns padded to whole groups
    bias: Float
    columns: int  # without the padding

    def __call__(self, x_TX: Float) -> Float:
        return linear(self.matrix, x_TX)


@dataclass(frozen=True)
class Norm:
    weight: Float
    bias: Float

    def __call__(self, x_PW: Float) -> Float:
        """Normalised rows, padded with zeros to whole groups."""
        out_PX = np.empty((len(x_PW), padded(x_PW.shape[1])), np.float32)
        _kernels.layer_norm(x_PW, self.weight, self.bias, LN_EPS, out_PX)
        return out_PX


@dataclass(frozen=True)
class Block:
    norm0: Norm
    qkv: Linear  # all q, all k, all v; inside each, head by head
    out: Linear
    norm1: Norm
    fc0: Linear
    fc1: Linear


@dataclass(frozen=True)
class VisionWeights:
    """An image side, ready to run."""

    path: Path
    config: VisionConfig
    image: ImageConfig
    text_width: int
    patch: Linear
    positions_hwW: Float
    blocks: tuple[Block, ...]
    final_norm: Norm
    pre_norm: Norm
    linear_1: Linear
    linear_2: Linear


# What `encode` does, wherever it is done.
Run = Callable[[VisionWeights, Sequence[NDArray[np.uint8]], Progress | None], list[Float]]


def open_vision(side: Path | GgufFile, *, packed: bool = True) -> VisionWeights:
    """Read the image side of an mmproj file or of a packed file.

    Args:
        packed: an mmproj file's matrices are packed; without, they become float32, four times as large, as tests need
            them. A packed file's stay where they lie.

    Raises:
        ModelFileError: damage, another model's image side, a missing or misshapen tensor.
    """
    file = _opened(side)
    read = _Reader(file, packed)
    c, processor, D = read.facts()
    W, F, patch = c.hidden_size, c.ffn_size, c.patch_size
    return VisionWeights(
        file.path,
        c,
        processor,
        D,
        _in_floats(
            read.floats("v.patch_embd.weight", W, 3, patch, patch).reshape(W, -1),
            read.floats("v.patch_embd.bias", W),
        ),
        read.floats(POSITIONS, c.grid_height * c.grid_width, W).reshape(c.grid_height, c.grid_width, W),
        tuple(_block(read, f"v.blk.{i}.", W, F) for i in range(c.n_layers)),
        read.norm("v.post_ln", W),
        read.norm("mm.input_norm", W),
        read.linear(("mm.1",), 4 * W, 4 * W),
        read.linear(("mm.2",), D, 4 * W),
    )


def tower_facts(side: Path | GgufFile) -> tuple[VisionConfig, ImageConfig, int]:
    """Sizes of the tower, what its processor needs, and the width of the rows that it gives; from the header alone.

    Raises ModelFileError.
    """
    return _Reader(_opened(side)).facts()


def _opened(side: Path | GgufFile) -> GgufFile:
    return side if isinstance(side, GgufFile) else GgufFile(side)


def _block(read: "_Reader", at: str, W: int, F: int) -> Block:
    # A packed file has q, k and v as one matrix, since one product gives them.
    qkv = (f"{at}attn_qkv",) if f"{at}attn_qkv.weight" in read.packed else tuple(f"{at}{n}" for n in QKV)
    return Block(
        norm0=read.norm(f"{at}ln1", W),
        qkv=read.linear(qkv, 3 * W, W),
        out=read.linear((f"{at}attn_out",), W, W),
        norm1=read.norm(f"{at}ln2", W),
        fc0=read.linear((f"{at}ffn_up",), F, W),
        fc1=read.linear((f"{at}ffn_down",), W, F),
    )


class _Reader(Tensors):
    """The image side's tensors."""

    def __init__(self, file: GgufFile, pack: bool = True) -> None:
        super().__init__(file)
        self.pack = pack

    def facts(self) -> tuple[VisionConfig, ImageConfig, int]:
        """As `tower_facts` gives them."""
        file, path = self.file, self.file.path
        table = file.tensors.get(POSITIONS)
        config = VisionConfig.from_gguf(file.metadata, table.shape[0] if table else 0, str(path))
        self.get(POSITIONS)
        D = file.metadata.get("clip.vision.projection_dim")
        if not isinstance(D, int) or D < 1:
            raise ModelFileError(f"{path}: clip.vision.projection_dim is {D!r}; expected a whole number")
        return config, ImageConfig.from_gguf(file.metadata, path), D

    def norm(self, name: str, W: int) -> Norm:
        return Norm(self.floats(f"{name}.weight", W), self.floats(f"{name}.bias", W))

    def linear(self, names: tuple[str, ...], rows: int, columns: int) -> Linear:
        """A matrix of so many rows and columns, or several of equal height stacked."""
        each = rows // len(names)
        bias = np.concatenate([self.floats(f"{name}.bias", each) for name in names])
        if f"{names[0]}.weight" in self.packed:
            layout, data = self.stored(
                f"{names[0]}.weight", "matrix", 1, rows, columns, lambda s: matrix_bytes(s, rows, columns)
            )
            return Linear(Matrix(layout, data, rows, padded(columns)), bias, columns)
        pieces = self.pieces([f"{name}.weight" for name in names], each, columns)
        if not self.pack:
            return _in_floats(np.concatenate(list(pieces)), bias)
        data = np.empty(matrix_bytes(LAYOUT, rows, columns), np.uint8)
        at = 0
        for piece in pieces:
            size = matrix_bytes(LAYOUT, *piece.shape)
            _kernels.pack_q8(piece, data[at : at + size])
            at += size
        return Linear(Matrix(LAYOUT, data, rows, padded(columns)), bias, columns)

    def pieces(self, names: Sequence[str], rows: int, columns: int) -> Iterator[Float]:
        """The rows of equal matrices one after the other, float32, in pieces of whole row blocks."""
        waiting = np.empty((0, columns), np.float32)
        for name in names:
            tensor = self.get(name, rows, columns)
            for start in range(0, rows, PACK_ROWS):
                part = self.rows(tensor, start, min(PACK_ROWS, rows - start))
                waiting = np.concatenate([waiting, part]) if len(waiting) else part
                whole = len(waiting) // 16 * 16
                if whole:
                    yield np.ascontiguousarray(waiting[:whole])
                    waiting = waiting[whole:]
            self.file.forget(tensor)
        if len(waiting):
            yield np.ascontiguousarray(waiting)


def _in_floats(weight_OI: Float, bias: Float) -> Linear:
    whole = np.zeros((len(weight_OI), padded(weight_OI.shape[1])), np.float32)
    whole[:, : weight_OI.shape[1]] = weight_OI
    return Linear(Matrix("F32", whole.view(np.uint8).reshape(-1), *whole.shape), bias, weight_OI.shape[1])


def packed_form(weights: VisionWeights) -> Iterator[tuple[str, Float | Linear]]:
    """The image side's tensors as a packed file holds them: names, and float32 values or a matrix, without its bias."""
    c = weights.config
    padded_WX = weights.patch.matrix.data.view(np.float32).reshape(c.hidden_size, -1)
    patch_WX = padded_WX[:, : weights.patch.columns]
    yield "v.patch_embd.weight", patch_WX.reshape(-1, 3, c.patch_size, c.patch_size)
    yield "v.patch_embd.bias", weights.patch.bias
    yield POSITIONS, weights.positions_hwW.reshape(-1, c.hidden_size)
    parts: list[tuple[str, Norm | Linear]] = []
    for i, block in enumerate(weights.blocks):
        parts += zip((f"v.blk.{i}.{name}" for name in BLOCK), vars(block).values(), strict=True)
    parts += [("v.post_ln", weights.final_norm), ("mm.input_norm", weights.pre_norm)]
    parts += [("mm.1", weights.linear_1), ("mm.2", weights.linear_2)]
    for name, part in parts:
        yield f"{name}.weight", part if isinstance(part, Linear) else part.weight
        yield f"{name}.bias", part.bias


def padded(width: int) -> int:
    return -(-width // GROUP) * GROUP


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one picture."""

    picture: int
    first: int  # row within the picture
    start: int  # row among all pictures
    stop: int


def encode(
    weights: VisionWeights, canvases: Sequence[NDArray[np.uint8]], on_progress: Progress | None = None
) -> list[Float]:
    """Embedding rows [M, D] of pictures, each resized and padded: uint8 [14 h, 14 w, 3], h and w even."""
    c = weights.config
    W, H = c.hidden_size, c.n_heads
    grids = [(pixels.shape[0] // c.patch_size, pixels.shape[1] // c.patch_size) for pixels in canvases]
    sizes = [h * w for h, w in grids]
    calls = list(calls_of(sizes, ROWS))
    ends = np.cumsum(sizes).tolist()
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    x_PW = np.empty((ends[-1], W), np.float32)
    for pixels, grid, span in zip(canvases, grids, spans, strict=True):
        _embed(weights, pixels, grid, x_PW[span])
    angles = [patch_angles(grid, W // H) for grid in grids]
    stores = [_kernels.PatchStore(size, H, W // H) for size in sizes]
    done, total = 0, len(weights.blocks) * len(calls)
    for block in weights.blocks:
        for call in calls:
            rows = slice(call[0].start, call[-1].stop)
            qkv_PX = block.qkv(block.norm0(x_PW[rows]))
            for piece in call:
                cos_PK, sin_PK = (t[piece.first :][: piece.stop - piece.start] for t in angles[piece.picture])
                own = qkv_PX[piece.start - rows.start : piece.stop - rows.start]
                stores[piece.picture].place(piece.first, own, block.qkv.bias, cos_PK, sin_PK)
        for call in calls:
            rows = slice(call[0].start, call[-1].stop)
            o_PX = np.empty((rows.stop - rows.start, padded(W)), np.float32)
            for piece in call:
                stores[piece.picture].attend(
                    piece.first, o_PX[piece.start - rows.start : piece.stop - rows.start]
                )
            _kernels.add_bias(block.out(o_PX), block.out.bias, x_PW[rows])
            lifted_PF = _gelu(block.fc0, block.norm1(x_PW[rows]), exact=False)
            _kernels.add_bias(block.fc1(lifted_PF), block.fc1.bias, x_PW[rows])
            done += 1
            if on_progress:
                on_progress(done / total)
    return [_project(weights, x_PW[span], grid) for span, grid in zip(spans, grids, strict=True)]


def calls_of(sizes: Sequence[int], most: int) -> Iterator[list[Piece]]:
    """Pieces of pictures, small ones gathered up to `most` rows, whole blocks of keys, that are worked on together."""
    call: list[Piece] = []
    start = 0
    for picture, size in enumerate(sizes):
        for first in range(0, size, most):
            n = min(most, size - first)
            if call and start + n - call[0].start > most:
                yield call
                call = []
            call.append(Piece(picture, first, start, start + n))
            start += n
    yield call


def _embed(weights: VisionWeights, pixels: NDArray[np.uint8], grid: tuple[int, int], x_PW: Float) -> None:
    """Patch projection plus the position table at this grid: the residual stream."""
    patch, (h, w) = weights.config.patch_size, grid
    places = position_rows(weights.positions_hwW, grid)
    step = max(1, ROWS // w)
    for first in range(0, h, step):
        strip = pixels[first * patch : (first + step) * patch]
        out_PW = x_PW[first * w : (first + step) * w]
        out_PW[:] = weights.patch(_pad(image.patches(strip, weights.image)))
        for row_wW, values_wW in zip(out_PW.reshape(-1, w, x_PW.shape[1]), places, strict=False):
            _kernels.add_bias(values_wW, weights.patch.bias, row_wW)


def _gelu(layer: Linear, x_TX: Float, *, exact: bool) -> Float:
    y_TF = layer(x_TX)
    out_TX = np.empty((len(y_TF), padded(y_TF.shape[1])), np.float32)
    _kernels.gelu(y_TF, layer.bias, exact, out_TX)
    return out_TX


def _project(weights: VisionWeights, x_PW: Float, grid: tuple[int, int]) -> Float:
    """The last norm, 2×2 patches side by side (top left, top right, bottom left, bottom right), and the projector."""
    h, w = grid
    W = weights.config.hidden_size
    x_hwW = x_PW.reshape(h // 2, 2, w // 2, 2, W)
    out = []
    step = max(1, ROWS // 2 // w)  # rows of tokens: ROWS patches
    for first in range(0, h // 2, step):
        part = x_hwW[first : first + step].transpose(0, 2, 1, 3, 4)  # token row, token column, 2, 2, W
        rows_PW = np.ascontiguousarray(part).reshape(-1, W)
        normed_PW = np.ascontiguousarray(weights.final_norm(rows_PW)[:, :W])
        joined_MX = _pad(np.ascontiguousarray(weights.pre_norm(normed_PW)[:, :W]).reshape(-1, 4 * W))
        hidden_MX = _gelu(weights.linear_1, joined_MX, exact=True)
        rows_MD = np.zeros((len(joined_MX), weights.text_width), np.float32)
        _kernels.add_bias(weights.linear_2(hidden_MX), weights.linear_2.bias, rows_MD)
        out.append(rows_MD)
    return np.concatenate(out)


def _pad(x_TI: Float) -> Float:
    extra = padded(x_TI.shape[1]) - x_TI.shape[1]
    return np.pad(x_TI, ((0, 0), (0, extra))) if extra else x_TI


def position_rows(table_hwW: Float, grid: tuple[int, int]) -> Iterator[Float]:
    """The learned table at another size, one row of patches after the other: [columns, W].

    Bicubic with a = -0.75 and border values repeated, without antialiasing even when shrinking.
    """
    row_at, row_weight = _taps(table_hwW.shape[0], grid[0])
    column_at, column_weight = _taps(table_hwW.shape[1], grid[1])
    for at, weight in zip(row_at, row_weight, strict=True):
        line_wW = sum(weight[i] * table_hwW[at[i]] for i in range(4))
        yield np.ascontiguousarray(
            sum(column_weight[:, i, None] * line_wW[column_at[:, i]] for i in range(4))
        )


def _taps(n_in: int, n_out: int) -> tuple[NDArray[np.int64], Float]:
    """The four source rows of each output row and their weights, [n_out, 4]."""
    source = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    base = np.floor(source)
    t, a = source - base, -0.75

    def near(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a + 2) * u - (a + 3)) * u * u + 1

    def far(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a * u - 5 * a) * u + 8 * a) * u - 4 * a

    at = np.clip(base[:, None].astype(np.int64) + np.arange(-1, 3), 0, n_in - 1)
    return at, np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], -1).astype(np.float32)


def patch_angles(grid: tuple[int, int], K: int) -> tuple[Float, Float]:
    """cos and sin [P, K/2]: even pairs of channels turn with the column, odd pairs with the row."""
    frequency = ROPE_THETA ** (-np.arange(0, K, 4) / K)
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angle = np.stack([column[:, None] * frequency, row[:, None] * frequency], -1).reshape(len(row), K // 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class ImageEncoder:
    """Pictures to embedding rows, through the cache; the weights are read when the first picture is new."""

    def __init__(
        self,
        side: Path | GgufFile,
        text_width: int,
        cache: ImageCache,
        max_tokens: int | None = None,
        run: Run | None = None,
    ) -> None:
        """`side` is an mmproj file or holds one; of its tensors nothing is read. `max_tokens` caps the tokens of one
        picture below the published limit. `run` is `encode`, or does the same elsewhere.

        Raises:
            ModelFileError: the file is missing, damaged, or belongs to another model.
        """
        self.file = _opened(side)
        _, self.image, found = tower_facts(self.file)
        if found != text_width:
            raise ModelFileError(
                f"{self.file.path}: gives rows of {found} values, but the text model takes {text_width}; "
                "it belongs to another model"
            )
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"{max_tokens} image tokens were asked for; give at least 1")
        self.cache, self.max_tokens, self.text_width = cache, max_tokens, text_width
        self.run = run or encode
        self.n_encoded = 0  # pictures that no cache knew
        self._weights: VisionWeights | None = None

    @cached_property
    def identity(self) -> str:
        """Changes when the weights do: a digest of each tensor's name, shape and first 4096 bytes, not of all of it."""
        digest = hashlib.sha256()
        for name, tensor in self.file.tensors.items():
            if of_image_side(name):
                digest.update(f"{name} {tensor.type} {tensor.shape}".encode())
                digest.update(tensor.data[:4096].tobytes())
        return digest.hexdigest()

    def n_tokens(self, size: tuple[int, int], *, capped: bool = True) -> int:
        """Tokens of a picture (width, height). Raises UsageError for a shape that the model cannot take."""
        _, (h, w) = image.plan(size, self.image, self.max_tokens if capped else None)
        return h * w // 4

    def encode(
        self, pictures: "Iterable[Image | NDArray[np.uint8]]", on_progress: Progress | None = None
    ) -> list[EncodedImage]:
        """One row of embeddings for each image token; `pictures` are RGB, and taken one after the other. An array is a canvas already."""
        canvases, keys = [], []
        for picture in pictures:
            if isinstance(picture, np.ndarray):
                pixels = picture
                grid = (pixels.shape[0] // image.PATCH, pixels.shape[1] // image.PATCH)
            else:
                size, grid = image.plan(picture.size, self.image, self.max_tokens)
                pixels = image.canvas(picture, size, grid)
            # The canvas and the processor's constants are all that the tower sees of a picture.
            facts = f"{RESULT_VERSION} {self.identity} {grid} {self.image.mean} {self.image.std}"
            digest = hashlib.sha256(facts.encode())
            digest.update(pixels.data)
            canvases.append(pixels)
            keys.append(digest.hexdigest())
        found = {key: self.cache.get(key) for key in keys}
        new = {key: c for key, c in zip(keys, canvases, strict=True) if found[key] is None}
        done, total = 0, sum(pixels.size for pixels in new.values())
        if new and on_progress:
            on_progress(0.0)  # reading the weights takes seconds
        for batch in _batches(new):
            self._weights = self._weights or open_vision(self.file)
            share = sum(new[key].size for key in batch) / total
            report = _part(on_progress, done / total, share)
            for key, rows_MD in zip(
                batch, self.run(self._weights, [new[k] for k in batch], report), strict=True
            ):
                found[key] = rounded = _rounded(rows_MD)
                self.cache.put(key, rounded)
                done += new[key].size
            self.n_encoded += len(batch)
        return [
            EncodedImage(len(rows), rows, key, pixels)
            for key, pixels in zip(keys, canvases, strict=True)
            if (rows := found[key]) is not None
        ]


def _batches(canvases: Mapping[str, NDArray[np.uint8]]) -> Iterator[list[str]]:
    """Pictures to be encoded together: small ones share products, a large one has the memory to itself."""
    batch: list[str] = []
    rows = 0
    for key, pixels in canvases.items():
        n = pixels.size // (3 * image.PATCH**2)
        if batch and rows + n > BATCH_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(key)
        rows += n
    if batch:
        yield batch


def _part(on_progress: Progress | None, start: float, share: float) -> Progress | None:
    """A batch's own progress as part of the whole."""
    return (lambda done: on_progress(start + share * done)) if on_progress else None


def _rounded(rows_MD: Float) -> NDArray[np.float16]:
    if not np.abs(rows_MD).max() < 65504:  # also false for NaN
        raise ModelFileError("the image side gives values beyond float16; its weights are damaged")
    return rows_MD.astype(np.float16)
