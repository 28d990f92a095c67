"""What more threads can give: the serial part of a token, the cost of a barrier, and the curve that follows.

    python benchmarks/scaling.py FILE [--threads 1,2] [--memory 60] [--json RESULTS]

Decodes and prefills with each number of threads that this machine has cores for. The thread pool counts its calls and
the time inside them, so what is left of a token's time is the part that one thread does alone; calls that do nothing
say what starting and joining the threads costs. From these the curve is computed up to 16 cores:

    token(n)  = serial + calls * barrier(n) + bytes / min(n * one core's GB/s, the memory's)
    prompt(n) = serial + calls * barrier(n) + one thread's time in calls / n

Barriers are taken to grow with log2 of the threads from the measured one, and the memory's speed is the measured one, or
`--memory`'s GB/s. The measured rows say "measured", all others "expected".
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from full_shape import append_line

from kimi_lite.runtime import _kernels, kernels
from kimi_lite.runtime.engine import Engine

N_PROMPT, N_DECODE, N_EMPTY = 512, 48, 50


@dataclass(frozen=True)
class Measured:
    """Seconds of one token, or of one prompt token, with so many threads; `inside` is the part in the pool's calls."""

    threads: int
    decode_s: float
    decode_inside_s: float
    decode_calls: float
    prefill_s: float
    prefill_inside_s: float
    prefill_calls: float
    barrier_s: float


def measure(engine: Engine, threads: int) -> Measured:
    kernels.set_threads(threads)
    ids = np.random.default_rng(0).integers(0, engine.n_named, N_PROMPT + N_DECODE).tolist()

    def timed(new: list[int]) -> tuple[float, int, float]:
        calls, inside = _kernels.pool_times()
        start = time.perf_counter()
        engine.append(new)
        seconds = time.perf_counter() - start
        calls_after, inside_after = _kernels.pool_times()
        return seconds, calls_after - calls, (inside_after - inside) / 1e9

    engine.rewind(0)
    engine.append(ids[:8])
    engine.rewind(0)
    prefill_s, prefill_calls, prefill_inside = timed(ids[:N_PROMPT])
    engine.rewind(64)
    tokens = [timed([token]) for token in ids[N_PROMPT:]]
    barriers = []
    for _ in range(N_EMPTY):
        start = time.perf_counter()
        _kernels.empty_calls(500)
        barriers.append((time.perf_counter() - start) / 500)
    return Measured(
        threads,
        median(t[0] for t in tokens),
        median(t[2] for t in tokens),
        tokens[0][1],
        prefill_s / N_PROMPT,
        prefill_inside / N_PROMPT,
        prefill_calls / N_PROMPT,
        median(barriers),
    )


def curve(rows: list[Measured], n_bytes: int, memory: float | None) -> list[tuple[int, str, float, float]]:
    """(threads, how known, decode tok/s, prefill tok/s) up to 16 threads. `memory` in bytes per second."""
    one, most = rows[0], rows[-1]
    serial = one.decode_s - one.decode_inside_s
    core = n_bytes / one.decode_inside_s
    memory = memory or max(n_bytes / row.decode_inside_s for row in rows)
    prefill_serial = one.prefill_s - one.prefill_inside_s
    out = [(row.threads, "measured", 1 / row.decode_s, 1 / row.prefill_s) for row in rows]
    for n in (2, 4, 6, 8, 12, 16):
        barrier = most.barrier_s * math.log2(n) / max(1.0, math.log2(most.threads))
        decode = serial + one.decode_calls * barrier + n_bytes / min(n * core, memory)
        prefill = prefill_serial + one.prefill_calls * barrier + one.prefill_inside_s / n
        out.append((n, "expected", 1 / decode, 1 / prefill))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a packed file of the full shape")
    parser.add_argument("--threads", default=",".join(map(str, range(1, kernels.default_threads() + 1))))
    parser.add_argument("--memory", type=float, help="GB/s that all cores together read, for the curve")
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    arguments = parser.parse_args()
    engine = Engine(arguments.file, context=N_PROMPT + N_DECODE + 8, vram=0)
    rows = [measure(engine, int(n)) for n in arguments.threads.split(",")]
    n_bytes = engine.weights.step_bytes(1)
    print(f"{'threads':>7}{'serial us':>11}{'calls':>7}{'barrier us':>12}{'decode GB/s':>13}")
    for row in rows:
        serial = (row.decode_s - row.decode_inside_s) * 1e6
        speed = n_bytes / row.decode_inside_s / 1e9
        print(
            f"{row.threads:>7}{serial:>11.0f}{row.decode_calls:>7.0f}{row.barrier_s * 1e6:>12.2f}{speed:>13.1f}"
        )
    points = curve(rows, n_bytes, arguments.memory * 1e9 if arguments.memory else None)
    print(f"\n{'threads':>7}  {'':10}{'decode tok/s':>13}{'prefill tok/s':>15}")
    for n, how, decode, prefill in points:
        print(f"{n:>7}  {how:10}{decode:>13.1f}{prefill:>15.1f}")
    record = {
        "bench": "scaling",
        "file": arguments.file.name,
        "isa": kernels.isa(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
        "token_bytes": n_bytes,
        "memory_gb_s": arguments.memory,
        "measured": [asdict(row) for row in rows],
        "curve": points,
    }
    print(json.dumps(record))
    if arguments.json:
        append_line(arguments.json, record)


if __name__ == "__main__":
    main()
