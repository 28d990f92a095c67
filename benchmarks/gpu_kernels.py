"""Where does a card's time go, kernel by kernel? For one token and for prompts, with as many experts there as fit.

    python benchmarks/gpu_kernels.py FILE [--vram 8G] [--json RESULTS]

PyTorch's profiler (which must be there, with CUDA) watches the card while the engine works; it sees all kernels of the
process, whoever launched them, and those of captured graphs. Times are of each kernel by itself; what a step takes as a
whole is measured without the profiler. A full-shape FILE is made by benchmarks/full_shape.py.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from full_shape import append_line, commit
from gpu import card_facts
from torch.profiler import ProfilerActivity, profile

from kimi_lite.bench import random_tokens
from kimi_lite.errors import KimiLiteError
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.placement import parse_size

DECODED, DEPTHS, PROMPTS = 16, (64, 8192), (256, 2048)


def kernels_of(what: str, work: Callable[[], object], steps: int) -> dict[str, Any]:
    """Milliseconds of one of so many steps, and of each kernel how often it runs in one and its microseconds."""
    work()  # captures graphs
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    times = defaultdict[str, list[float]](list)
    for event in seen.events():
        times[event.name.partition("(")[0]].append(event.time_range.end - event.time_range.start)
    kernels = {
        name: (len(us) / steps, sum(us) / len(us))
        for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))
        if name[0].islower() and not name.startswith("cu")  # the others are calls of the driver, and copies
    }
    ms = 1e3 * seconds / steps
    print(f"\n{what}: {ms:.3f} ms, {sum(n * us for n, us in kernels.values()) / 1e3:.3f} of them in kernels")
    for name, (n, us) in kernels.items():
        print(f"  {name:20}{n:8.1f} x {us:8.2f} us = {n * us:9.1f} us")
    return {
        "what": what,
        "ms": round(ms, 3),
        "kernels": {k: [round(x, 2) for x in v] for k, v in kernels.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--vram", default="80G", help="of the card's memory, at most so much")
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} finds no card to watch; it takes one built for CUDA")
    engine = Engine(a.file, context=max(DEPTHS) + DECODED, vram=parse_size(a.vram, "--vram"))
    model = engine.model
    assert isinstance(model, HybridModel)
    print(model.placement)

    def prompt(n: int) -> None:
        engine.rewind(0)
        engine.append(random_tokens(engine, n))

    def decode(depth: int) -> None:
        engine.rewind(depth)
        for token in random_tokens(engine, DECODED, seed=5):
            engine.append([token])

    rows = [kernels_of(f"a prompt of {n} tokens", lambda n=n: prompt(n), 1) for n in PROMPTS]  # type: ignore[misc]
    for depth in DEPTHS:
        prompt(depth)
        rows.append(kernels_of(f"a token after {depth}", lambda depth=depth: decode(depth), DECODED))  # type: ignore[misc]
    record = {
        "bench": "gpu_kernels",
        "file": a.file.name,
        "card": card_facts() or model.device.name,
        "commit": commit(),
        "experts": [model.plan.n_resident, model.plan.n_experts],
        "rows": rows,
    }
    print(json.dumps(record))
    if a.json:
        append_line(a.json, record)


if __name__ == "__main__":
    try:
        main()
    except KimiLiteError as error:
        print(f"gpu_kernels.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
