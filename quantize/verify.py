"""Reads back what was written, a packed or GGUF file or a checkpoint, and compares every matrix with the one it was made from."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import matrix_bytes, mlp_bytes, split_mlp, unpack
from kimi_lite.quantize.plan import Checkpoint, Output, Target, text_outputs, vision_outputs

Matrices = Iterator[NDArray[np.float32]]


def tensor_errors(checkpoint_dir: Path, path: Path) -> Iterator[tuple[str, float]]:
    """(name, rms of the difference over rms of the weights) for each tensor of the file or directory, in its order."""
    checkpoint = Checkpoint(checkpoint_dir)
    for output, matrices in (
        _written_directory(checkpoint, path) if path.is_dir() else _written_file(checkpoint, path)
    ):
        square = difference = 0.0
        for source, stored in zip(output.sources, matrices, strict=True):
            weight = source.read(0, source.rows).astype(np.float64)
            square += float((weight**2).sum())
            difference += float(((stored - weight) ** 2).sum())
        yield output.name, (difference / square) ** 0.5 if square else 0.0


def _outputs(checkpoint: Checkpoint, target: Target, *, seeing: bool) -> list[Output]:
    vision = vision_outputs(checkpoint, target) if seeing and checkpoint.config.vision else []
    return text_outputs(checkpoint, target) + vision


def _written_directory(checkpoint: Checkpoint, path: Path) -> Iterator[tuple[Output, Matrices]]:
    other = _outputs(Checkpoint(path), "int4", seeing=True)
    for output, theirs in zip(_outputs(checkpoint, "int4", seeing=True), other, strict=True):
        yield output, (source.read(0, source.rows) for source in theirs.sources)


def _written_file(checkpoint: Checkpoint, path: Path) -> Iterator[tuple[Output, Matrices]]:
    file = GgufFile(path)
    packed = "kimi_lite.packed.version" in file.metadata
    layouts = dict(
        zip(*(file.metadata.get(f"kimi_lite.packed.{key}", ()) for key in ("name", "layout")), strict=True)
    )
    for planned in _outputs(
        checkpoint, "int4" if packed else "bf16", seeing=packed
    ):  # else it is a file of its own
        output = replace(planned, type=layouts.get(planned.name, planned.type))
        yield output, _stored(file, output)


def _stored(file: GgufFile, output: Output) -> Matrices:
    """The weights that the file holds, one matrix for each of the output's sources."""
    tensor = file.tensors[output.name]
    if not output.packed:
        whole = tensor.float32().reshape(len(output.sources), -1)
        for row, source in zip(whole, output.sources, strict=True):
            yield row.reshape(source.rows, source.columns)
        return
    count, rows, columns = output.packed_shape()
    for i in range(count):
        if output.kind == "mlp":
            size = mlp_bytes(output.type, rows, columns)
            gate, up, down = split_mlp(tensor.data[i * size : (i + 1) * size], output.type, rows, columns)
            yield unpack(gate, output.type, rows, columns)
            yield unpack(up, output.type, rows, columns)
            yield unpack(down, output.type, columns, rows)
        else:
            size = matrix_bytes(output.type, rows, columns)
            yield unpack(tensor.data[i * size : (i + 1) * size], output.type, rows, columns)
