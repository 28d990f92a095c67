"""A checkpoint written again with most of its text model in 4 bits, as compressed-tensors: for vLLM and SGLang.

The 4-bit matrices hold the very weights that the packed int4 file holds, calibrated or not: its q and its scales, which are
numbers of four bits and so exact in bf16. Everything else is copied byte for byte: what int4 has in 8 bits (embedding, kv_a,
kv_b), the head, router, norms, image side, and the files beside the weights, of which config.json says what was done.

    4 bits         q_proj, o_proj, and gate, up and down of the dense layer, the routed and the shared experts
    as published   embed_tokens, lm_head, kv_a_proj_with_mqa, kv_b_proj, norms, router, image tower, projector
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, ModelFileError, UsageError
from kimi_lite.formats import compressed_tensors
from kimi_lite.formats.config import read_json
from kimi_lite.formats.packed import split_mlp, unpack_quantized
from kimi_lite.formats.safetensors_file import ShardSpec, write_shards
from kimi_lite.quantize.plan import Checkpoint, Output, Source

SHARD_BYTES = 4_000_000_000
LAYOUT = "q4b32"
LEFT = ("lm_head", "kv_a_proj_with_mqa", "kv_b_proj")  # linear layers of the text model that stay as they are
# What config.json calls them: names in vLLM and transformers have other beginnings than in the checkpoint.
IGNORE = [
    *(f"re:.*{name}$" for name in LEFT),
    r"re:.*mlp\.gate$",
    r"re:.*vision_tower\..*",
    r"re:.*multi_modal_projector\..*",
]
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def chosen(outputs: list[Output]) -> list[Output]:
    """Of the packed int4 plan's text outputs, those whose matrices are written in 4 bits."""
    return [o for o in outputs if o.type == LAYOUT and o.name != "output.weight"]


def check_target(checkpoint: Checkpoint, out: Path) -> None:
    """Raises:
    UsageError: `out` is there already, or the checkpoint is in 4 bits already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already; give the name of a new directory")
    if any(name.endswith(compressed_tensors.PARTS) for name in checkpoint.tensors):
        raise UsageError(f"{checkpoint.directory} is in compressed-tensors form already; copy it")


def write(
    checkpoint: Checkpoint, out: Path, outputs: list[Output], pieces: Iterator[tuple[str, NDArray[np.uint8]]]
) -> Iterator[tuple[str, int, int]]:
    """Write the directory from the packed pieces of the `chosen` outputs; tensor, bytes done and in all, after each piece.

    It gets its name when it is complete. On any error nothing is left behind.

    Raises:
        DoesNotFitError: the disk has less room than it needs.
        ModelFileError: `out` cannot be written.
    """
    sources = [source for output in outputs for source in output.sources]
    quantized = {source.name for source in sources}
    copied = [tensor for name, tensor in checkpoint.tensors.items() if name not in quantized]
    specs = [spec for s in sources for spec in compressed_tensors.written(s.name, s.rows, s.columns)]
    specs += [ShardSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in copied]
    total, done = sum(spec.n_bytes for spec in specs), 0

    def values() -> Iterator[tuple[str, NDArray[Any]]]:
        for source, data in _matrices(outputs, pieces):
            yield from compressed_tensors.parts(
                source.name, *unpack_quantized(data, LAYOUT, source.rows, source.columns)
            )
        for tensor in copied:
            for piece in tensor.pieces():
                yield tensor.name, piece

    try:
        free = shutil.disk_usage(out.parent).free
        if free < total:
            raise DoesNotFitError(f"{out}: needs {total:,} bytes, but {out.parent} has {free:,} free")
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    except FileNotFoundError:
        raise ModelFileError(f"{out}: the directory {out.parent} does not exist") from None
    except OSError as error:
        raise ModelFileError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        _side_files(checkpoint, temporary)
        for name, n_bytes in write_shards(temporary, specs, values(), SHARD_BYTES):
            done += n_bytes
            yield name, done, total
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)  # a temporary directory is private; the finished one follows the umask
        if out.exists():
            out.rmdir()  # empty, as `check_target` saw
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _matrices(
    outputs: list[Output], pieces: Iterator[tuple[str, NDArray[np.uint8]]]
) -> Iterator[tuple[Source, NDArray[np.uint8]]]:
    """Every source in order with its packed bytes. A piece is an MLP, or some row blocks of a matrix."""
    for output in outputs:
        if output.kind == "mlp":
            _, width, columns = output.packed_shape()
            for i in range(0, len(output.sources), 3):
                name, piece = next(pieces)
                assert name == output.name, f"{name} came where {output.name} was due"
                parts = split_mlp(piece, LAYOUT, width, columns)
                yield from zip(output.sources[i : i + 3], parts, strict=True)
            continue
        (source,) = output.sources
        due, blocks = output.spec().n_bytes, []
        while due:
            name, piece = next(pieces)
            assert name == output.name, f"{name} came where {output.name} was due"
            due -= piece.size
            blocks.append(piece)
        yield source, np.concatenate(blocks)


def _side_files(checkpoint: Checkpoint, out: Path) -> None:
    """Everything beside the weights, as published, but for what config.json now has to say."""
    for path in sorted(checkpoint.directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, out / path.name)
    config = read_json(checkpoint.directory / "config.json")
    config["quantization_config"] = compressed_tensors.quantization_config(IGNORE)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
