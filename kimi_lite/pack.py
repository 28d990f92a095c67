"""`kimi-lite pack`: a standard GGUF and its image side into one packed file, once for all.

Loading a standard GGUF packs its matrices in memory each time: seconds, and as many bytes as the file has. A packed
file holds the same weights, bit for bit, as the kernels read them: it is mapped, starts at once and is shared between
processes. Matrices of types without a packed layout, and the embedding, of which single rows are looked up, are
copied as they are. The image side's matrices become q8g32, as the runtime has them in any case: 0.48 GB at full size,
held in memory while they are written.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.gguf_file import (
    GgufFile,
    GgufTensor,
    GgufWriter,
    TensorSpec,
    mmproj_beside,
    warn_of_mmproj_beside,
)
from kimi_lite.formats.packed import PAGE, matrix_bytes
from kimi_lite.runtime import kernels
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.kernels import Matrix
from kimi_lite.runtime.tensors import PACKED_VERSION, of_image_side, packed_table
from kimi_lite.runtime.vision import ImageEncoder, Linear, VisionWeights, open_vision, packed_form
from kimi_lite.runtime.weights import open_weights

Progress = Callable[[str, int, int], None]  # tensor, bytes done, in all


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the packed file: `table` is layout, kind, count, rows and columns if it is packed."""

    spec: TensorSpec
    data: Callable[[], Iterator[NDArray[Any]]]
    table: tuple[str, str, int, int, int] | None = None


def pack(path: Path, out: Path, progress: Progress | None = None, *, mmproj: Path | None = None) -> int:
    """Write the packed form of the model at `path` to `out`; returns its size in bytes.

    Args:
        mmproj: the file with the image side; by default the one beside `path`, if there is one. A packed file gains
            its image side in the same way.

    Raises:
        ModelFileError: a file is damaged or another model's. Nothing is written.
        UsageError: `path` is packed already or holds nothing to pack, or `out` is the same file or a directory.
        DoesNotFitError: the disk is too small.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give the name of the file to write")
    if mmproj is None and mmproj_beside(path).exists():
        mmproj = mmproj_beside(path)
    for source in (path, mmproj):
        if source is not None and source.exists() and out.exists() and out.samefile(source):
            raise UsageError(f"{out}: the packed file cannot take the place of one that it is made from")
    weights = open_weights(path, pack=False)  # says what is wrong before a byte is written
    file = GgufFile(path)
    if mmproj is None and "kimi_lite.packed.version" in file.metadata:
        raise UsageError(f"{path} is packed already; it runs as it is")
    entries = list(_text(file))
    if mmproj is None and not any(entry.table for entry in entries):
        raise UsageError(f"{path}: none of its types has a packed layout; it runs as it is")
    ours = ("clip.", "kimi_lite.packed.", "kimi_lite.in_token_limit")
    metadata = {k: v for k, v in file.metadata.items() if not k.startswith(ours)}
    if mmproj is not None:
        side = ImageEncoder(mmproj, weights.config.hidden_size, ImageCache(None))
        metadata |= {k: v for k, v in side.file.metadata.items() if k.startswith("clip.")}
        metadata["kimi_lite.in_token_limit"] = side.image.token_limit
        entries += _image_side(open_vision(side.file))
        warn_of_mmproj_beside(out)
    packed = [(entry.spec.name, *entry.table) for entry in entries if entry.table]
    metadata |= {"general.alignment": PAGE, "kimi_lite.packed.version": PACKED_VERSION}
    for i, key in enumerate(("name", "layout", "kind", "count", "rows", "columns")):
        metadata[f"kimi_lite.packed.{key}"] = [row[i] for row in packed]
    total, done = sum(entry.spec.n_bytes for entry in entries), 0
    kernels.set_threads(None)
    with GgufWriter(out, metadata, [entry.spec for entry in entries], PAGE) as writer:
        for entry in entries:
            for piece in entry.data():
                writer.write(piece)
                done += piece.nbytes
                if progress:
                    progress(entry.spec.name, done, total)
    return out.stat().st_size


def _text(file: GgufFile) -> Iterator[_Entry]:
    """The text model's tensors: packed where their type has a layout, else as they are."""
    table = packed_table(file)
    for tensor in file.tensors.values():
        if of_image_side(tensor.name):
            continue
        layout = _layout(tensor)
        if layout is None:
            spec = TensorSpec(tensor.name, tensor.type, tensor.shape)
            yield _Entry(spec, partial(_copied, file, tensor), table.get(tensor.name))
            continue
        count, rows, columns = math.prod(tensor.shape[:-2]), *tensor.shape[-2:]
        spec = TensorSpec(tensor.name, "I8", (count * matrix_bytes(layout, rows, columns),))
        yield _Entry(spec, partial(_packed, file, tensor), (layout, "matrix", count, rows, columns))


def _layout(tensor: GgufTensor) -> str | None:
    # The older joint expansion is taken apart at load, so it stays as it is.
    if len(tensor.shape) < 2 or tensor.name == "token_embd.weight" or "attn_kv_b" in tensor.name:
        return None
    return kernels.packed_as(tensor.type)


def _copied(file: GgufFile, tensor: GgufTensor) -> Iterator[NDArray[Any]]:
    yield tensor.data
    file.forget(tensor)


def _packed(file: GgufFile, tensor: GgufTensor) -> Iterator[NDArray[Any]]:
    """One matrix after the other, so that memory stays flat."""
    count = math.prod(tensor.shape[:-2])
    size = tensor.data.size // count
    for i in range(count):
        matrix = Matrix(tensor.type, tensor.data[i * size : (i + 1) * size], *tensor.shape[-2:])
        yield kernels.pack(matrix).data
    file.forget(tensor)


def _image_side(weights: VisionWeights) -> Iterator[_Entry]:
    for name, part in packed_form(weights):
        if isinstance(part, Linear):
            matrix, data = part.matrix, part.matrix.data
            yield _Entry(
                TensorSpec(name, "I8", data.shape),
                partial(iter, (data,)),
                (matrix.layout, "matrix", 1, matrix.rows, part.columns),
            )
        else:
            yield _Entry(TensorSpec(name, "F32", part.shape), partial(iter, (part,)))
