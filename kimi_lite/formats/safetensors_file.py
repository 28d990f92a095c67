"""A checkpoint directory of safetensors shards, read a range of rows at a time, and written piece by piece.

    shard    u64 header length, JSON {name: {dtype, shape, data_offsets: [begin, end]}}, data
    index    model.safetensors.index.json: {"weight_map": {name: shard}}; a single model.safetensors needs none

Every extent is checked against the file before anything is read. Rows come as float32 through ordinary reads, so a
32 GB checkpoint never fills the memory map of the process.

Source: the safetensors format description; checked against the `safetensors` package.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, ModelFileError
from kimi_lite.formats.config import read_json

DTYPES = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "I32": "<i4",
    "I64": "<i8",
}  # name: numpy's; of bf16 the bits
FLOATS = ("BF16", "F16", "F32")  # those that weights have
MAX_HEADER = 100 << 20
INDEX = "model.safetensors.index.json"
COPIED_AT_ONCE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, type, shape, first byte."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows start…start+n-1 of the first axis as float32 [n, …]."""
        raw = self.raw(start, n)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    def raw(self, start: int = 0, n: int | None = None) -> NDArray[Any]:
        """The same rows as they are stored; bf16 as uint16."""
        n = self.shape[0] - start if n is None else n
        width = math.prod(self.shape[1:])
        kind = np.dtype(DTYPES[self.dtype])
        raw = np.fromfile(self.path, kind, n * width, offset=self.offset + start * width * kind.itemsize)
        if len(raw) != n * width:
            raise ModelFileError(f"{self.path}: the file became shorter while it was read")
        return raw.reshape(n, *self.shape[1:])

    def pieces(self) -> Iterator[NDArray[Any]]:
        """All rows as they are stored, some megabytes at a time."""
        row = math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype]).itemsize
        step = max(1, COPIED_AT_ONCE // max(1, row))
        for start in range(0, self.shape[0], step):
            yield self.raw(start, min(step, self.shape[0] - start))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard.

    Raises:
        ModelFileError: the file is missing, truncated, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ModelFileError(
                    f"{path}: the header claims {length:,} bytes of a file of {size:,}; it is truncated, download it again"
                )
            header: Any = json.loads(file.read(length))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: not found, although the index names it; download it") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelFileError(
            f"{path}: the header is not JSON; the file is damaged, download it again"
        ) from None
    tensors = {}
    entries: dict[str, Any] = header if isinstance(header, dict) else {"header": None}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            plain = all(type(v) is int and v >= 0 for v in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            raise ModelFileError(
                f"{path}: the entry of {name!r} is damaged; download the file again"
            ) from None
        if dtype not in DTYPES:
            raise ModelFileError(f"{path}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        if not plain or end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise ModelFileError(f"{path}: the entry of {name!r} is damaged; download the file again")
        if 8 + length + end > size:
            raise ModelFileError(
                f"{path}: {name} needs {8 + length + end:,} bytes, but the file has {size:,}; it is truncated, download it again"
            )
        tensors[name] = StoredTensor(name, path, dtype, shape, 8 + length + begin)
    return tensors


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name.

    Raises:
        ModelFileError: no weights, a missing or damaged shard, or a tensor that its shard does not hold.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.exists() and not index.exists():
        return read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelFileError(f"{index}: weight_map must map tensor names to file names")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ModelFileError(f"{index}: {name} points to {file!r}, which is not a file name")
        if file not in shards:
            shards[file] = read_header(directory / file)
        if name not in shards[file]:
            raise ModelFileError(f"{directory / file}: does not hold {name}, although the index says so")
        tensors[name] = shards[file][name]
    return tensors


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_shards(
    directory: Path,
    specs: Sequence[ShardSpec],
    pieces: Iterable[tuple[str, NDArray[Any]]],
    shard_bytes: int,
) -> Iterator[tuple[str, int]]:
    """Write shards of at most so many bytes (or one tensor) and their index; gives the tensor and size of each piece written.

    `pieces` come in the order of `specs`, a tensor in one piece or several; none is kept. A step of the iteration writes the
    next piece, and the last one the index.

    Raises:
        DoesNotFitError: the disk is full. What was written so far stays.
    """
    shards: list[list[ShardSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.n_bytes for s in shards[-1]) + spec.n_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    coming, weight_map = iter(pieces), {}
    try:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header, at = {}, 0
            for spec in shard:
                offsets = [at, at + spec.n_bytes]
                header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
                at += spec.n_bytes
                weight_map[spec.name] = file
            head = json.dumps(header, separators=(",", ":")).encode()
            head += b" " * (-len(head) % 8)
            with (directory / file).open("wb") as out:
                out.write(len(head).to_bytes(8, "little") + head)
                for spec in shard:
                    written = 0
                    while written < spec.n_bytes:
                        name, piece = next(coming)
                        assert name == spec.name, f"{name} came where {spec.name} was due"
                        assert piece.dtype.itemsize == np.dtype(DTYPES[spec.dtype]).itemsize, (
                            f"{name}: {piece.dtype}"
                        )
                        out.write(np.ascontiguousarray(piece).data)
                        written += piece.nbytes
                        yield name, piece.nbytes
                    assert written == spec.n_bytes, f"{spec.name}: {written} bytes, {spec.n_bytes} declared"
        index = {"metadata": {"total_size": sum(s.n_bytes for s in specs)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DoesNotFitError(f"{directory}: writing stopped ({error.strerror})") from None
