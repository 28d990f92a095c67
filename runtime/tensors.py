"""A model file's tensors by name and shape, for the text model and the image side alike.

Whoever opens a part of a model asks here for each tensor that it needs, and gets a view of the memory map. What is
missing, misshapen, or of a packed layout that does not fit its bytes is one sentence that names file and tensor.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.gguf_file import GgufFile, GgufTensor
from kimi_lite.formats.packed import LAYOUTS

PACKED_VERSION = 1


class Tensors:
    """Hands out a file's tensors; `packed` lists those that lie there as the kernels read them."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.packed = file, packed_table(file)
        self.asked = set[str]()

    def get(self, name: str, *shape: int) -> GgufTensor:
        """The tensor, in this shape if one is given. Raises ModelFileError."""
        self.asked.add(name)
        try:
            tensor = self.file.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.file.path}: the tensor {name!r} is missing; the file is incomplete"
            ) from None
        if shape and tensor.shape != shape:
            raise self._misshapen(name, tensor.shape, shape)
        return tensor

    def floats(self, name: str, *shape: int) -> NDArray[np.float32]:
        """A small tensor as float32: a view of the map if it is stored so."""
        return np.ascontiguousarray(self.rows(self.get(name, *shape)).reshape(shape))

    def rows(self, tensor: GgufTensor, start: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows start…start+n-1 of a tensor that is not packed, as float32."""
        try:
            return tensor.dequantize(start, n)
        except NotImplementedError:
            raise ModelFileError(
                f"{self.file.path}: {tensor.name} has the type {tensor.type}, which holds no weights; quantize the model again"
            ) from None

    def stored(
        self, name: str, kind: str, count: int, rows: int, columns: int, n_bytes: Callable[[str], int]
    ) -> tuple[str, NDArray[np.uint8]]:
        """A packed tensor's layout and bytes, once its description fits the configuration and its length."""
        data = self.get(name).data
        layout, *found = self.packed.get(name, ("none",))
        if tuple(found) != (kind, count, rows, columns):
            raise self._misshapen(name, tuple(found), (kind, count, rows, columns))
        if n_bytes(layout) != data.size:
            raise self._misshapen(name, (data.size,), (n_bytes(layout),))
        return layout, data

    def _misshapen(
        self, name: str, found: tuple[object, ...], expected: tuple[object, ...]
    ) -> ModelFileError:
        return ModelFileError(
            f"{self.file.path}: the tensor {name!r} has shape {list(found)}, expected {list(expected)} by the configuration"
        )


def holds_image_side(file: GgufFile) -> bool:
    """Whether the file holds an image tower: alone, or behind the text model of a packed file."""
    return "clip.projector_type" in file.metadata


def of_image_side(name: str) -> bool:
    """Whether a tensor of this name belongs to the image tower or its projector."""
    return name.startswith(("v.", "mm."))


def packed_table(file: GgufFile) -> dict[str, tuple[str, str, int, int, int]]:
    """name: (layout, kind, count, rows, columns) of a packed file's tensors; empty for a standard GGUF.

    Raises:
        ModelFileError: a version or a layout that this program does not know, or a damaged table.
    """
    version = file.metadata.get("kimi_lite.packed.version")
    if version is None:
        return {}
    if version != PACKED_VERSION:
        raise ModelFileError(
            f"{file.path}: packed layout version {version}; this program reads {PACKED_VERSION}: update kimi-lite, or quantize again"
        )
    columns = [
        file.metadata.get(f"kimi_lite.packed.{key}")
        for key in ("name", "layout", "kind", "count", "rows", "columns")
    ]
    if not all(isinstance(column, list) for column in columns) or len({len(c) for c in columns if c}) != 1:
        raise ModelFileError(f"{file.path}: the table of packed tensors is damaged; quantize the model again")
    table = {name: rest for name, *rest in zip(*columns, strict=True)}
    strange = sorted({str(entry[0]) for entry in table.values()} - set(LAYOUTS))
    if strange:
        raise ModelFileError(f"{file.path}: unknown packed layouts {', '.join(strange)}; update kimi-lite")
    return {name: tuple(entry) for name, entry in table.items()}
