"""A checkpoint directory of safetensors shards, read a range of rows at a time.

    shard    u64 header length, JSON {name: {dtype, shape, data_offsets: [begin, end]}}, data
    index    model.safetensors.index.json: {"weight_map": {name: shard}}; a single model.safetensors needs none

Every extent is checked against the file before anything is read. Rows come as float32 through ordinary reads, so a
32 GB checkpoint never fills the memory map of the process.

Source: the safetensors format description; checked against the `safetensors` package.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.config import read_json

DTYPES = {"BF16": 2, "F16": 2, "F32": 4}  # name: bytes
MAX_HEADER = 100 << 20


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
        n = self.shape[0] - start if n is None else n
        width = math.prod(self.shape[1:])
        raw_type = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[self.dtype]
        at = self.offset + start * width * DTYPES[self.dtype]
        raw = np.fromfile(self.path, raw_type, n * width, offset=at)
        if len(raw) != n * width:
            raise ModelFileError(f"{self.path}: the file became shorter while it was read")
        values = (
            (raw.astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else raw.astype(np.float32)
        )
        return values.reshape(n, *self.shape[1:])


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
        if not plain or end - begin != math.prod(shape) * DTYPES[dtype]:
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
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
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
