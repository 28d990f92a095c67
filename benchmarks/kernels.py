"""How many products a second does one core do, layout by layout, on weights that its cache holds?

    python benchmarks/kernels.py [--rounds 20] [--from-memory] [--json RESULTS]

The arithmetic alone: a matrix of 256 x 2048 weights, 0.3 to 0.6 MB, times 1, 8 and 128 tokens, one thread, activations
quantized once a call. With --from-memory each call has another matrix, of 256 MB in all, and 1, 2, 4 and 8 tokens. Each
round measures everything in turn; the best round counts, because what disturbs a core only ever slows it. `KIMI_LITE_ISA` chooses the instruction set. Real speeds are `kimi-lite bench`'s.
"""

import argparse
import time
from itertools import cycle
from pathlib import Path

import numpy as np
from full_shape import append_line, commit

from kimi_lite.bench import machine
from kimi_lite.formats.packed import matrix_bytes
from kimi_lite.runtime import kernels

LAYOUTS = ("q4b32", "q3b32", "q4g32", "q8g32", "q5g32", "i4g32", "q4k", "q6k")
ROWS, COLUMNS = 256, 2048
TOKENS, TOKENS_FROM_MEMORY = (1, 8, 128), (1, 2, 4, 8)
FROM_MEMORY = 256 << 20  # bytes, more than any cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--from-memory", action="store_true", help="weights that no cache holds")
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    a = parser.parse_args()
    kernels.set_threads(1)
    rng = np.random.default_rng(1)
    tokens = TOKENS_FROM_MEMORY if a.from_memory else TOKENS
    sizes = {layout: matrix_bytes(layout, ROWS, COLUMNS) for layout in LAYOUTS}
    raw = rng.integers(0, 60, FROM_MEMORY if a.from_memory else max(sizes.values()), np.uint8)
    weights = {  # small bytes are valid scales in every layout
        layout: cycle(
            [kernels.Matrix(layout, part, ROWS, COLUMNS) for part in raw[: len(raw) // n * n].reshape(-1, n)]
        )
        for layout, n in sizes.items()
    }
    inputs = {T: rng.standard_normal((T, COLUMNS), np.float32) for T in tokens}
    best: dict[str, dict[int, float]] = {layout: dict.fromkeys(tokens, 0.0) for layout in LAYOUTS}
    for _ in range(a.rounds):
        for layout, matrices in weights.items():
            for T, x_TI in inputs.items():
                repeats = max(1, 256 // T)
                start = time.perf_counter()
                for _ in range(repeats):
                    kernels.linear(next(matrices), x_TI)
                gmac = repeats * T * ROWS * COLUMNS / (time.perf_counter() - start) / 1e9
                best[layout][T] = max(best[layout][T], round(gmac, 1))
    where = "memory" if a.from_memory else "cache"
    print(f"GMAC/s of one core, {kernels.isa()}, weights from {where}")
    print(f"{'layout':<8}" + "".join(f"{T:>9} tok" for T in tokens))
    for layout, by_tokens in best.items():
        print(f"{layout:<8}" + "".join(f"{by_tokens[T]:>13.1f}" for T in tokens))
    if a.json:
        record = {
            "bench": "kernels",
            "isa": kernels.isa(),
            "weights_from": where,
            "gmac_per_s": best,
            "commit": commit(),
            **machine(),
        }
        append_line(a.json, record)


if __name__ == "__main__":
    main()
