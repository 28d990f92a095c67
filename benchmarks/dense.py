"""What would bitsandbytes' formats cost in quality, in place of our own, for the dense weights? Nothing of speed.

    python benchmarks/dense.py [CHECKPOINT] [--n 30] [--json FILE]

Dense is what every token reads (runtime/dense.py): attention's q, kv_a and o, shared experts, the dense layer, the head.
The held-out prompts of benchmarks/quality.py are read by models that differ in those alone, each product as
`--gpu-dense` has it, computed by bitsandbytes and PyTorch on the CPU; ours on the CPU's kernels, in the layouts that a
packed file holds. Twice: with everything else in bf16, so that nothing else is lost, and in the int4 file that
kimi-lite quantize writes, whose own dense weights are also rounded a second time, as happens when such a file is run with
`--gpu-dense`. Bits a weight are counted over the bytes of the dense matrices, scales and tables included; on a small
model the rows are short and the tables (1 kB a matrix) weigh more than at full size, so both are given.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from full_shape import append_line
from numpy.typing import NDArray
from quality import asked_for, compared, questions

from kimi_lite.formats.packed import LAYOUTS
from kimi_lite.quantize import plan
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime import dense
from kimi_lite.runtime.cost import matrix_size, sizes_of
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.kernels import Matrix, set_threads
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import make_plan
from kimi_lite.runtime.weights import Weights, open_weights

FULL_SIZE = (2048, 2816)  # the shared experts' matrices of Kimi-VL-A3B, for bits a weight at full size
CONTEXT = 1024


def files(checkpoint: Path, folder: Path) -> dict[str, Weights]:
    """The checkpoint in bf16, as kimi-lite quantize writes it, and with every matrix in 8 or in 4 bits."""
    found = {}
    for name, target, eight_bits in (
        ("bf16", "bf16", ()),
        ("int4 file", "int4", plan.EIGHT_BITS),
        ("q8g32", "q8_0", ()),
        ("q4b32", "int4", ()),
    ):
        kept, plan.EIGHT_BITS = plan.EIGHT_BITS, eight_bits
        try:
            quantize(checkpoint, folder / f"{name}.gguf", to=target)  # type: ignore[arg-type]
        finally:
            plan.EIGHT_BITS = kept
        found[name] = open_weights(folder / f"{name}.gguf")
    return found


def spliced(base: Weights, source: Weights, change: Callable[[Matrix], Matrix]) -> Weights:
    """`base` with the dense weights of `source`, changed."""
    layers = tuple(
        dense.with_dense(ours, {name: change(matrix) for name, matrix in dense.dense(theirs).items()})
        for ours, theirs in zip(base.layers, source.layers, strict=True)
    )
    return replace(base, layers=layers, head=change(source.head))


def bits(weights: Weights) -> float:
    """Bits a dense weight."""
    matrices = [m for layer in weights.layers for m in dense.dense(layer).values()] + [weights.head]
    return 8 * sum(map(matrix_size, matrices)) / sum(m.rows * m.columns for m in matrices)


def full_size_bits(layout: str) -> float:
    if layout in LAYOUTS:
        return LAYOUTS[layout].bits_per_weight
    rows, columns = FULL_SIZE
    return 8 * dense.n_bytes(layout, rows, columns) / (rows * columns)


def model_of(weights: Weights) -> CpuModel | HybridModel:
    """On the CPU's kernels, or with bitsandbytes' products between them."""
    if weights.head.layout not in dense.LAYOUTS:
        return CpuModel(weights, CONTEXT)
    device = SimulatedDevice(1 << 33)
    plan = make_plan(
        sizes_of(weights),
        device=device.name,
        free=device.free_bytes(),
        context=CONTEXT,
        speeds=device.speeds(),
    )
    return HybridModel(weights, device, plan)


def append(model: CpuModel | HybridModel, ids: list[int]) -> NDArray[np.float32]:
    return model.forward(np.asarray(ids, np.int32))


def main() -> None:
    a = asked_for(__doc__).parse_args()
    set_threads(None)
    asked = questions(a.checkpoint, a.seed, a.n)
    with tempfile.TemporaryDirectory() as folder:
        file = files(a.checkpoint, Path(folder))
        recipes: list[tuple[str, str, Weights, str | None]] = [
            (base, f"ours, {own}", file[own], None)
            for base in ("bf16", "int4 file")
            for own in ("q4b32", "q8g32")
        ]
        recipes += [("int4 file", "ours, the file's own", file["int4 file"], None)]
        recipes += [
            (base, f"{layout} of the bf16 weights", file["bf16"], layout)
            for base in ("bf16", "int4 file")
            for layout in dense.LAYOUTS
        ]
        recipes += [
            ("int4 file", f"{layout} of the file's own", file["int4 file"], layout)
            for layout in dense.LAYOUTS
        ]
        for base, name, source, layout in recipes:
            change = partial(dense.quantized_matrix, layout=layout) if layout else lambda matrix: matrix
            weights = spliced(file[base], source, change)
            model = model_of(weights)
            found = compared(asked, partial(append, model), partial(model.rewind, 0))
            at_full_size = full_size_bits(layout or source.head.layout)
            print(
                f"all else {base:10} dense: {name:28} {bits(weights):5.2f} bits ({at_full_size:.2f} at full size)   "
                f"KL {found['kl_mean']:.6f}   99th percentile {found['kl_p99']:.5f}   top-1 {found['top1']:.3%}",
                flush=True,
            )
            if a.json:
                record = {
                    "bench": "dense",
                    "model": a.checkpoint.name,
                    "seed": a.seed,
                    "prompts": len(asked),
                    "all_else": base,
                    "dense": name,
                    "bits_per_dense_weight": round(bits(weights), 3),
                    "bits_at_full_size": round(at_full_size, 3),
                    **found,
                    "versions": {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__},
                }
                append_line(a.json, record)


if __name__ == "__main__":
    main()
