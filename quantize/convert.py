"""The pipeline: open a checkpoint, plan the output, encode it piece by piece, write it, give it its name.

Memory stays flat at any model size: a piece is at most one expert or a few megabytes of rows, and only a handful are
under way at once. Two threads encode while one writes, since numpy works outside Python's lock.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import GgufWriter, mmproj_beside, warn_of_mmproj_beside
from kimi_lite.formats.packed import PAGE, join_mlp
from kimi_lite.quantize import compressed
from kimi_lite.quantize.calibrate import Calibration, Passage
from kimi_lite.quantize.encode import stored
from kimi_lite.quantize.plan import (
    PACKED,
    Checkpoint,
    Output,
    Source,
    Target,
    text_metadata,
    text_outputs,
    vision_metadata,
    vision_outputs,
)
from kimi_lite.quantize.resume import Journal, part_of

PIECE_WEIGHTS = 4 << 20  # weights encoded at once: 16 MB as float32, a few times that while encoding
THREADS = 2
Progress = Callable[[str, int, int], None]  # tensor, bytes written, bytes in all
Pieces = Iterator[tuple[str, NDArray[np.uint8]]]  # of tensors in file order, each with its tensor's name


@dataclass(frozen=True, slots=True)
class Result:
    """What was written. Bits per weight count the matrices of the text model."""

    paths: tuple[Path, ...]
    n_bytes: int
    seconds: float
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class _File:
    """One file to write."""

    path: Path
    metadata: dict[str, Any]
    outputs: list[Output]
    pieces: Pieces
    alignment: int = 32
    journal: Journal | None = None


def quantize(
    checkpoint_dir: Path,
    out: Path,
    *,
    to: Target = "int4",
    format: str | None = None,
    sample: Callable[[], Sequence[Passage]] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Write a checkpoint as one packed file; as standard GGUF: a text file and, if it has an image side, an mmproj file
    beside it; or as a checkpoint again, for the most part in 4 bits.

    Args:
        to: "int4", or "int3" with the routed experts in 3 bits, for the packed file; "q8_0", "q4_0", "bf16" or "f16" for
            standard GGUF.
        format: "int4", "int3" or "gguf"; follows from `to`, and is checked against it when given. Or "compressed-tensors": then
            `to` is "int4", and `out` a new directory.
        sample: gives what the text model's 3- and 4-bit matrices are rounded for (`calibrate`), once the checkpoint is known to
            be whole and the disk to have room; without it each weight is rounded to the nearest step.

    Raises:
        ModelFileError: the checkpoint is incomplete, damaged or another model's. Nothing is written.
        DoesNotFitError: the disk is too small.
        UsageError: `to` and `format` contradict each other, or `out` cannot be written.
    """
    start = time.monotonic()
    if to not in get_args(Target):
        raise UsageError(f"--to {to}: expected one of {', '.join(get_args(Target))}")
    own = to if to in PACKED else "gguf"
    as_checkpoint = to == "int4" and format == "compressed-tensors"
    if format not in (None, own) and not as_checkpoint:
        raise UsageError(f"--format {format} does not hold {to}; leave it out, or give --format {own}")
    if sample and to not in PACKED:
        raise UsageError(f"--calibrate rounds int4 and int3 only; leave it out for --to {to}")
    if to == "int3" and not sample:
        warnings.warn(
            "3 bits rounded to the nearest lose more than they must; give text and pictures like your own with --calibrate",
            KimiLiteWarning,
            stacklevel=2,
        )
    if out.is_dir() and not as_checkpoint:
        raise UsageError(
            f"{out} is a directory; give the name of the file to write, such as {out / 'model.gguf'}"
        )
    checkpoint = Checkpoint(checkpoint_dir)
    text = text_outputs(checkpoint, to)
    vision = vision_outputs(checkpoint, to) if checkpoint.config.vision else []
    checkpoint.finish()  # says what is missing before a byte is written
    weights = [o for o in text if o.kind != "float"]
    n_weights = sum(s.rows * s.columns for o in weights for s in o.sources)
    if as_checkpoint:
        compressed.check_target(checkpoint, out)
        rounded = compressed.chosen(text)
        pieces = _calibrated(checkpoint, text, rounded, sample) if sample else _encoded(rounded)
        total = 0
        for name, done, total in compressed.write(checkpoint, out, rounded, pieces):
            if progress:
                progress(name, done, total)
        n_rounded = sum(s.rows * s.columns for o in rounded for s in o.sources)
        bits = 16 - (16 - 4.5) * n_rounded / n_weights
        return Result((out,), total, time.monotonic() - start, bits)
    if to == "int3" and any(s.int4 for o in text if "_exps" in o.name for s in o.sources):
        warnings.warn(
            f"{checkpoint_dir}: experts are in 4 bits already; --to int4 keeps them as they are, 3 bits round them once more",
            KimiLiteWarning,
            stacklevel=2,
        )
    if to in PACKED:
        outputs = text + vision
        metadata = text_metadata(checkpoint, to, outputs)
        files = [
            _calibrated_file(checkpoint, out, metadata, text, vision, sample)
            if sample
            else _File(out, metadata, outputs, _encoded(outputs), PAGE)
        ]
        if vision:
            warn_of_mmproj_beside(out)
    else:
        files = [_File(out, text_metadata(checkpoint, to, text), text, _encoded(text))]
        if vision:
            files.append(_mmproj(checkpoint, to, vision, mmproj_beside(out)))
    total = sum(output.spec().n_bytes for output in text + vision)
    done = 0
    for file in files:
        for name, n_bytes in _written(file):
            done += n_bytes
            if progress:
                progress(name, done, total)
    bits = 8 * sum(o.spec().n_bytes for o in weights) / n_weights
    paths = tuple(file.path for file in files)
    return Result(paths, sum(p.stat().st_size for p in paths), time.monotonic() - start, bits)


def write_image_side(checkpoint_dir: Path, out: Path) -> None:
    """The image side alone, as an mmproj file in 8 bits: what a calibration's pictures are encoded with.

    Raises:
        ModelFileError: as `quantize`, or the checkpoint has no image side.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    if not checkpoint.config.vision:
        raise ModelFileError(f"{checkpoint_dir}: has no image side; calibrate it with text")
    text_outputs(checkpoint, "q8_0")
    vision = vision_outputs(checkpoint, "q8_0")
    checkpoint.finish()
    for _ in _written(_mmproj(checkpoint, "q8_0", vision, out)):
        pass


def _mmproj(checkpoint: Checkpoint, to: Target, vision: list[Output], path: Path) -> _File:
    return _File(path, vision_metadata(checkpoint, to), vision, _encoded(vision))


def _written(file: _File) -> Iterator[tuple[str, int]]:
    """Write the file; the tensor and the size of each piece that went into it, or has gone before."""
    journal, specs = file.journal, [o.spec() for o in file.outputs]
    start, part = (journal.start, journal.part) if journal else (0, None)
    try:
        with GgufWriter(file.path, file.metadata, specs, file.alignment, part=part, start=start) as writer:
            if start:
                yield specs[start].name, sum(spec.n_bytes for spec in specs[:start])
            for name, piece in file.pieces:
                writer.write(piece)
                if journal:
                    journal.note(writer)
                yield name, piece.size
    except BaseException:
        if journal:
            journal.stopped()
        raise
    if journal:
        journal.forget()


def _calibrated_file(
    checkpoint: Checkpoint,
    out: Path,
    metadata: dict[str, Any],
    text: list[Output],
    vision: list[Output],
    sample: Callable[[], Sequence[Passage]],
) -> _File:
    """The packed file, begun anew or from where a run of the same command was stopped."""
    outputs = text + vision
    GgufWriter(out, metadata, [o.spec() for o in outputs], PAGE, part=part_of(out)).check_room()
    calibration = Calibration(checkpoint.config, sample())
    journal = Journal(out, [repr(metadata).encode(), *checkpoint.shards()], calibration)
    pieces = _passed(calibration, text[journal.start :])
    return _File(out, metadata, outputs, chain(pieces, _encoded(vision)), PAGE, journal)


def _calibrated(
    checkpoint: Checkpoint,
    outputs: list[Output],
    wanted: list[Output],
    sample: Callable[[], Sequence[Passage]],
) -> Pieces:
    """The bytes of those that are wanted; the sample passes all of them."""
    names = {output.name for output in wanted}
    for name, piece in _passed(Calibration(checkpoint.config, sample()), outputs):
        if name in names:
            yield name, piece


def _passed(calibration: Calibration, outputs: list[Output]) -> Pieces:
    """Every tensor's bytes, when the sample has passed it."""
    for output in outputs:
        for piece in calibration.pieces(output):
            yield output.name, piece


def _encoded(outputs: list[Output]) -> Pieces:
    """Every tensor's bytes in order, encoded a few pieces ahead."""
    waiting: deque[tuple[str, Future[NDArray[np.uint8]]]] = deque()

    def first() -> tuple[str, NDArray[np.uint8]]:
        name, future = waiting.popleft()
        try:
            return name, future.result()
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error}") from None

    with ThreadPoolExecutor(THREADS) as pool:
        for output in outputs:
            for job in _pieces(output):
                waiting.append((output.name, pool.submit(job)))
                if len(waiting) > 2 * THREADS:
                    yield first()
        while waiting:
            yield first()


def _pieces(output: Output) -> Iterator[Callable[[], NDArray[np.uint8]]]:
    """Jobs whose results, one after the other, are the tensor's bytes."""
    if output.kind == "mlp":
        for i in range(0, len(output.sources), 3):
            yield _mlp_job(output, i)
        return
    for source in output.sources:
        # Whole row blocks, so that pieces of a packed matrix join without a seam.
        step = max(16, PIECE_WEIGHTS // source.columns // 16 * 16)
        for start in range(0, source.rows, step):
            yield _rows_job(output, source, start, min(step, source.rows - start))


def _mlp_job(output: Output, first: int) -> Callable[[], NDArray[np.uint8]]:
    gate, up, down = output.sources[first : first + 3]

    def job() -> NDArray[np.uint8]:
        g, u, d = (stored(source, output.type) for source in (gate, up, down))
        return join_mlp(g, u, d, output.type, gate.columns)

    return job


def _rows_job(output: Output, source: Source, start: int, n: int) -> Callable[[], NDArray[np.uint8]]:
    return lambda: stored(source, output.type, start, n)
