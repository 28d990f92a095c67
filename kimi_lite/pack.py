"""`kimi-lite pack`: a standard GGUF into a packed file, once for all.

Loading a standard GGUF packs its matrices in memory each time: seconds, and as many bytes as the file has. A packed
file holds the same weights, bit for bit, as the kernels read them: it is mapped, starts at once and is shared between
processes. Matrices of types without a packed layout, and the embedding, of which single rows are looked up, are
copied as they are.
"""

import math
from collections.abc import Callable
from pathlib import Path

from kimi_lite.errors import UsageError
from kimi_lite.formats.gguf_file import GgufFile, GgufTensor, GgufWriter, TensorSpec
from kimi_lite.formats.packed import PAGE, matrix_bytes
from kimi_lite.runtime import kernels
from kimi_lite.runtime.kernels import Matrix
from kimi_lite.runtime.weights import PACKED_VERSION, open_weights

Progress = Callable[[str, int, int], None]  # tensor, bytes done, in all


def pack(path: Path, out: Path, progress: Progress | None = None) -> int:
    """Write the packed form of the text model at `path` to `out`; returns its size in bytes.

    Raises:
        ModelFileError: `path` is damaged or another model's. Nothing is written.
        UsageError: `path` is packed already or holds nothing to pack, or `out` is the same file or a directory.
        DoesNotFitError: the disk is too small.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a directory; give the name of the file to write")
    if out.exists() and out.samefile(path):
        raise UsageError(f"{out}: the packed file cannot take the place of the one it is made from")
    open_weights(path, pack=False)  # says what is wrong before a byte is written
    file = GgufFile(path)
    if "kimi_lite.packed.version" in file.metadata:
        raise UsageError(f"{path} is packed already; it runs as it is")
    layouts = {tensor.name: layout for tensor in file.tensors.values() if (layout := _layout(tensor))}
    if not layouts:
        raise UsageError(f"{path}: none of its types has a packed layout; it runs as it is")
    specs = [
        TensorSpec(t.name, "I8", (_count(t) * matrix_bytes(layouts[t.name], *t.shape[-2:]),))
        if t.name in layouts
        else TensorSpec(t.name, t.type, t.shape)
        for t in file.tensors.values()
    ]
    packed = [file.tensors[name] for name in layouts]
    metadata = file.metadata | {
        "general.alignment": PAGE,
        "kimi_lite.packed.version": PACKED_VERSION,
        "kimi_lite.packed.name": list(layouts),
        "kimi_lite.packed.layout": list(layouts.values()),
        "kimi_lite.packed.kind": ["matrix"] * len(layouts),
        "kimi_lite.packed.count": [_count(t) for t in packed],
        "kimi_lite.packed.rows": [t.shape[-2] for t in packed],
        "kimi_lite.packed.columns": [t.shape[-1] for t in packed],
    }
    total, done = sum(spec.n_bytes for spec in specs), 0
    kernels.set_threads(None)
    with GgufWriter(out, metadata, specs, PAGE) as writer:
        for tensor, spec in zip(file.tensors.values(), specs, strict=True):
            if tensor.name in layouts:
                size = tensor.data.size // _count(tensor)
                for i in range(_count(tensor)):
                    data = tensor.data[i * size : (i + 1) * size]
                    writer.write(kernels.pack(Matrix(tensor.type, data, *tensor.shape[-2:])).data)
            else:
                writer.write(tensor.data)
            file.forget(tensor)
            done += spec.n_bytes
            if progress:
                progress(tensor.name, done, total)
    return out.stat().st_size


def _layout(tensor: GgufTensor) -> str | None:
    # The older joint expansion is taken apart at load, so it stays as it is.
    if len(tensor.shape) < 2 or tensor.name == "token_embd.weight" or "attn_kv_b" in tensor.name:
        return None
    return kernels.packed_as(tensor.type)


def _count(tensor: GgufTensor) -> int:
    return math.prod(tensor.shape[:-2])
