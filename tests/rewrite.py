"""GGUF files changed on purpose, for tests of damage and of files that someone else wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_lite.formats.gguf_file import GgufFile, GgufWriter, TensorSpec


def rewritten(path: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """The file with its metadata and tensors changed by `change(metadata, {name: (type, shape, bytes)})`."""
    file = GgufFile(path)
    metadata = dict(file.metadata)
    tensors = {n: (t.type, t.shape, t.data) for n, t in file.tensors.items()}
    change(metadata, tensors)
    specs = [TensorSpec(n, t, s) for n, (t, s, _) in tensors.items()]
    with GgufWriter(out, metadata, specs, file.alignment) as writer:
        for _, _, data in tensors.values():
            writer.write(data)
    return out


def without_image_side(path: Path, out: Path) -> Path:
    """The text model alone, whether or not the file holds an image side."""

    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in [k for k in metadata if k.startswith("clip.")]:
            del metadata[key]
        gone = {name for name in tensors if name.startswith(("v.", "mm."))}
        for name in gone:
            del tensors[name]
        keys = [k for k in metadata if k.startswith("kimi_lite.packed.") and k != "kimi_lite.packed.version"]
        keep = [i for i, name in enumerate(metadata["kimi_lite.packed.name"]) if name not in gone]
        for key in keys:
            metadata[key] = [metadata[key][i] for i in keep]

    return rewritten(path, out, change)
