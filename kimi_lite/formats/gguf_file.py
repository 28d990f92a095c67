"""GGUF containers: a bounded, memory-mapped reader and a streaming writer.

    header   "GGUF", version u32 = 3, tensor count u64, metadata count u64
    metadata key, type u32, value;  strings are a u64 length and UTF-8;  arrays a type, a u64 count and the values
    tensors  name, number of dimensions u32, sizes u64 (fastest first), type u32, offset u64
    data     from the next multiple of general.alignment (32 unless said), each tensor at its offset from there

The reader trusts nothing: every length and count is held against the bytes that are left before it is used, and every
tensor's extent against the file, so a damaged or hostile file ends in one sentence. Data is never copied: tensors are
views of the map. The writer declares all tensors first, then takes their bytes in order and in pieces, into a
temporary file beside the target that gets its name only when it is complete.

Where the system can, files are mapped in large pages (2 MB): decoding is a tenth faster with them than with 512 times as many
small ones. Linux makes them when a file is read through a map that asks for them, if the file system knows how (ext4 since 6.16, XFS).
A file that is in memory already stays in whatever pages it came in, so the writer lets go of what it has written.

Source: the GGUF specification (ggml project); checked against the `gguf` package in both directions.
"""

import contextlib
import mmap
import os
import shutil
import struct
import tempfile
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, KimiLiteWarning, ModelFileError
from kimi_lite.formats.ggml_types import BY_NAME, BY_NUMBER

MAGIC, VERSION = b"GGUF", 3
MAX_COUNT = 1 << 20  # tensors or metadata entries; the real file has 430 and 45
MAX_DIMENSIONS = 4
LARGE_PAGE = 2 << 20
STRING, ARRAY = 8, 9
SCALARS: dict[int, str] = {  # GGUF's value types, as struct codes
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its place in the map. `shape` is numpy's order, slowest first."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def rows(self) -> NDArray[np.uint8]:
        """The stored bytes, one row of the last axis each: [rows, bytes per row]."""
        return self.data.reshape(-1, row_bytes(self.type, self.shape[-1]))

    def dequantize(self, start: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows start…start+n-1 as float32 [n, last axis]."""
        block = self.rows()[start : None if n is None else start + n]
        if self.type == "F32":
            return block.view("<f4").astype(np.float32, copy=False)
        from gguf import GGMLQuantizationType, dequantize  # slow to import, and a packed file does without

        return np.asarray(dequantize(block, GGMLQuantizationType[self.type]), np.float32).reshape(
            len(block), -1
        )

    def float32(self) -> NDArray[np.float32]:
        """The whole tensor as float32 in its shape."""
        return self.dequantize().reshape(self.shape)


def row_bytes(type_name: str, n: int) -> int:
    """Bytes of n elements of a ggml type; n must fill whole blocks."""
    block = BY_NAME[type_name]
    assert n % block.elements == 0, f"{n} elements do not fill blocks of {block.elements} ({type_name})"
    return n // block.elements * block.bytes


class _Cursor:
    """Reads forward through the map; running past its end is the file's fault, said so."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}; the file is damaged, download or quantize it again")

    def take(self, n: int) -> int:
        """Claim n bytes and return where they begin."""
        if n > len(self.data) - self.at:
            raise self.fail(f"the header needs {n} bytes at {self.at}, but the file ends at {len(self.data)}")
        self.at += n
        return self.at - n

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        n = self.scalar("<Q")
        start = self.take(n)
        try:
            return self.data[start : start + n].decode()
        except UnicodeDecodeError:
            raise self.fail(f"a string at {start} is not UTF-8") from None

    def value(self, kind: int, wanted: bool = True) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise self.fail(f"a metadata value at {self.at} has the unknown type {kind}")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind].replace("?", "?"))
            start = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data, dtype, count, start).tolist()
        if kind != STRING:
            raise self.fail(
                f"an array at {self.at} holds the type {kind}; only numbers and strings are known"
            )
        if count > (len(self.data) - self.at) // 8:  # each string takes at least its length
            raise self.fail(f"an array at {self.at} claims {count} strings")
        return self.strings(count) if wanted else self.pass_over(count)

    def strings(self, count: int) -> list[str]:
        """The same as `string` count times, without a call for each: vocabularies have 163,840."""
        data, at, end, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        out = []
        try:
            for _ in range(count):
                (n,) = length(data, at)
                at += 8
                if n > end - at:
                    raise self.fail(f"a string at {at} claims {n} bytes")
                out.append(data[at : at + n].decode())
                at += n
        except struct.error:
            raise self.fail(f"the file ends inside an array of strings at {at}") from None
        except UnicodeDecodeError:
            raise self.fail(f"a string at {at} is not UTF-8") from None
        self.at = at
        return out

    def pass_over(self, count: int) -> None:
        """To behind as many strings."""
        data, at, length = self.data, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except (struct.error, IndexError, OverflowError):
            at = len(data) + 1
        if at > len(data):
            raise self.fail(f"the file ends inside the array of strings at {self.at}")
        self.at = at


class GgufFile:
    """An open GGUF file: `metadata`, `tensors` by name, `alignment`. The map lives as long as any view of it.

    Metadata under the keys `without` are not kept: a vocabulary's merges take a tenth of a second to read.

    Raises:
        ModelFileError: not a GGUF file, an unknown version, or damage of any kind.
    """

    def __init__(self, path: Path, without: Container[str] = ()) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise ModelFileError(
                        f"{path}: {size} bytes are too few for a GGUF file; download it again"
                    )
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):  # a kernel without large pages
                        self.map.madvise(mmap.MADV_HUGEPAGE)
        except FileNotFoundError:
            raise ModelFileError(f"{path}: not found") from None
        except IsADirectoryError:
            raise ModelFileError(
                f"{path}: a directory; give a .gguf file, or make one with `kimi-lite quantize {path} OUT.gguf`"
            ) from None
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
        read = _Cursor(self.map, path)
        magic = self.map[: read.take(4) + 4]
        if magic != MAGIC:
            raise ModelFileError(f"{path}: begins with {magic!r}, not with b'GGUF'; this is not a GGUF file")
        version = read.scalar("<I")
        if version not in (2, VERSION):
            raise ModelFileError(f"{path}: GGUF version {version}; this program reads versions 2 and 3")
        n_tensors, n_keys = read.scalar("<Q"), read.scalar("<Q")
        if n_tensors > MAX_COUNT or n_keys > MAX_COUNT:
            raise read.fail(f"the header claims {n_tensors} tensors and {n_keys} metadata keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = read.string()
            if not key or key in self.metadata:
                raise read.fail(f"the metadata key {key!r} is empty or stands there twice")
            wanted = key not in without
            value = read.value(read.scalar("<I"), wanted)
            if wanted:
                self.metadata[key] = value
        self.alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(self.alignment, int) or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise read.fail(f"general.alignment is {self.alignment!r}, not a power of two")
        declared = [self._declaration(read) for _ in range(n_tensors)]
        base = -(-read.at // self.alignment) * self.alignment
        whole = np.frombuffer(self.map, np.uint8)
        self.tensors: dict[str, GgufTensor] = {}
        for name, type_name, shape, offset, n_bytes in declared:
            if name in self.tensors:
                raise read.fail(f"the tensor {name!r} stands there twice")
            if offset % self.alignment:
                raise read.fail(f"the tensor {name!r} lies at {offset}, not a multiple of {self.alignment}")
            if offset + n_bytes > size - base:
                raise read.fail(
                    f"the tensor {name!r} needs {n_bytes} bytes at {base + offset}, but the file has {size} in all"
                )
            self.tensors[name] = GgufTensor(name, type_name, shape, whole[base + offset :][:n_bytes])

    def bring_in(self, wanted: Callable[[str], bool] = lambda name: True) -> threading.Thread:
        """Begin to read the file into memory, in order, up to the last tensor of a wanted name.

        It is there sooner than if its pages came one by one, as they are used. Where it is in memory already, that is a tenth of a
        second of one thread.
        """
        stop = max(
            (self._start(t) + t.data.size for name, t in self.tensors.items() if wanted(name)), default=0
        )
        whole = np.frombuffer(self.map, np.uint8)
        reader = threading.Thread(target=np.add.reduce, args=(whole[:stop:LARGE_PAGE],), daemon=True)
        reader.start()
        return reader

    def forget(self, tensor: GgufTensor) -> None:
        """Let go of the memory that a tensor's pages take; they come back from the file if they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self._start(tensor)
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, start + tensor.data.size - first)

    def _start(self, tensor: GgufTensor) -> int:
        """Where a tensor's bytes begin in the file."""
        whole = np.frombuffer(self.map, np.uint8)
        return int(tensor.data.__array_interface__["data"][0] - whole.__array_interface__["data"][0])

    @staticmethod
    def _declaration(read: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
        name = read.string()
        n_dimensions = read.scalar("<I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise read.fail(f"the tensor {name!r} has {n_dimensions} dimensions")
        sizes = [read.scalar("<Q") for _ in range(n_dimensions)]
        kind, offset = read.scalar("<I"), read.scalar("<Q")
        if kind not in BY_NUMBER:
            raise read.fail(f"the tensor {name!r} has the unknown type {kind}")
        block = BY_NUMBER[kind]
        if sizes[0] % block.elements or min(sizes) < 1:
            raise read.fail(
                f"the tensor {name!r} has sizes {sizes}, which do not fill blocks of {block.elements}"
            )
        n_bytes = block.bytes * (sizes[0] // block.elements)
        for size in sizes[1:]:
            n_bytes *= size  # Python's integers do not overflow
        return name, block.name, tuple(reversed(sizes)), offset, n_bytes


def mmproj_beside(path: Path) -> Path:
    """Where the image side lies that is a file of its own: model.gguf has model-mmproj.gguf beside it."""
    return path.with_name(f"{path.stem}-mmproj.gguf")


def warn_of_mmproj_beside(path: Path) -> None:
    """Say that a file with an image side inside is about to get another one beside it, which would be used."""
    if mmproj_beside(path).exists():
        text = f"{mmproj_beside(path)} lies beside {path.name} and is used in place of the image side inside; delete it"
        warnings.warn(text, KimiLiteWarning, stacklevel=3)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: name, ggml type, shape in numpy's order."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        n = row_bytes(self.type, self.shape[-1])
        for size in self.shape[:-1]:
            n *= size
        return n


class GgufWriter:
    """Writes one GGUF file as a context manager: `with GgufWriter(path, metadata, specs) as out: out.write(…)`.

    Bytes come in the order of `specs`, in pieces of any size; padding is added where a tensor ends. On success the
    file gets its name; on any error, or when bytes are missing, nothing is left behind.

    Args:
        part: where bytes are written until then; after an error this file stays, and can be gone on with.
        start: the tensor with which to go on; all before it are in `part`.

    Raises:
        DoesNotFitError: the disk has less room than the file needs, before a byte is written or while writing.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        specs: Sequence[TensorSpec],
        alignment: int = 32,
        *,
        part: Path | None = None,
        start: int = 0,
    ) -> None:
        self.path, self.specs, self.alignment, self.part = path, list(specs), alignment, part
        offsets, at = [], 0
        for spec in self.specs:
            offsets.append(at)
            at += -(-spec.n_bytes // alignment) * alignment
        head = [MAGIC, struct.pack("<IQQ", VERSION, len(self.specs), len(metadata))]
        for key, value in metadata.items():
            head += [_string(key), _value(value)]
        for spec, offset in zip(self.specs, offsets, strict=True):
            head += [_string(spec.name), struct.pack("<I", len(spec.shape))]
            head += [struct.pack("<Q", size) for size in reversed(spec.shape)]
            head.append(struct.pack("<IQ", BY_NAME[spec.type].number, offset))
        self.head = b"".join(head)
        self.head += bytes(-len(self.head) % alignment)
        self.n_bytes = len(self.head) + at
        self.n_done = len(self.head) + offsets[start] if start else 0
        self._index, self._written = start, 0

    @property
    def due(self) -> str | None:
        """The tensor that begins with the next byte; None in the midst of one and at the end."""
        return None if self._written or self._index == len(self.specs) else self.specs[self._index].name

    def check_room(self) -> None:
        """Raise DoesNotFitError if the disk has less than the file needs beside its part, ModelFileError without a directory."""
        folder = self.path.parent
        held = self.part.stat().st_size if self.part and self.part.exists() else 0
        try:
            free, needed = shutil.disk_usage(folder).free, self.n_bytes - held
        except OSError:
            raise ModelFileError(f"{self.path}: the directory {folder} does not exist") from None
        if free < needed:
            raise DoesNotFitError(f"{self.path}: needs {needed:,} bytes, but {folder} has {free:,} free")

    def __enter__(self) -> "GgufWriter":
        self.check_room()
        try:
            self._file: IO[bytes] = (
                self.part.open("r+b" if self.n_done else "wb")
                if self.part
                else tempfile.NamedTemporaryFile(
                    dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part", delete=False
                )
            )
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self.n_done:
            self._file.truncate(self.n_done)
            self._file.seek(self.n_done)
        else:
            self._put(self.head)
        return self

    def sync(self) -> tuple[int, int]:
        """Bring what was written to the disk; how many tensors are whole, and how many bytes that is."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._stopped(error) from None
        return self._index, self._file.tell()

    def write(self, data: NDArray[Any]) -> None:
        """The next bytes of the tensor that is due; a piece must not run over its end."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        spec = self.specs[self._index]
        self._written += flat.size
        assert self._written <= spec.n_bytes, (
            f"{spec.name}: {self._written} bytes given, {spec.n_bytes} declared"
        )
        self._put(flat.data)
        if self._written == spec.n_bytes:
            self._put(bytes(-spec.n_bytes % self.alignment))
            self._index, self._written = self._index + 1, 0

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._stopped(error) from None

    def _stopped(self, error: OSError) -> DoesNotFitError:
        left = "" if self.part else "; nothing was left behind"
        return DoesNotFitError(f"{self.path}: writing stopped ({error.strerror}){left}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        temporary = Path(self._file.name)
        try:
            if kind is None:
                assert self._index == len(self.specs), (
                    f"{self.specs[self._index].name} was declared but not written"
                )
                self.sync()
                if hasattr(os, "posix_fadvise"):  # not in memory any more: it shall come back in large pages
                    with contextlib.suppress(OSError):  # advice, which a file system may not know
                        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self._file.close()
                mask = os.umask(0)
                os.umask(mask)
                temporary.chmod(
                    0o666 & ~mask
                )  # a temporary file is private; the finished one follows the umask
                temporary.replace(self.path)
        finally:
            self._file.close()
            if self.part is None:
                temporary.unlink(missing_ok=True)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type. Whole numbers are u32 (or i32, u64); in arrays they are i32."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int() if 0 <= value < 2**32:
            return struct.pack("<II", 4, value)
        case int() if value < 0:
            return struct.pack("<Ii", 5, value)
        case int():
            return struct.pack("<IQ", 10, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
    return struct.pack("<I", ARRAY) + _array(list(value))


def _array(values: Iterable[Any]) -> bytes:
    values = list(values)
    assert values, "an empty array has no type"
    if isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    if isinstance(values[0], float):
        return struct.pack("<IQ", 6, len(values)) + np.asarray(values, "<f4").tobytes()
    return struct.pack("<IQ", 5, len(values)) + np.asarray(values, "<i4").tobytes()
