"""How long does a question about a picture take from the start of the process, the first time and when the picture is known?

    python benchmarks/second_question.py [FILE] [--mmproj FILE] [--side 896] [--rounds 3] [--json RESULTS]

Three rows: nothing is known; the encoded picture is kept, but not what the text model read of it; both are. Each process is
`kimi-lite ask` with another question and one token of answer, on the CPU, and the times are medians of as many rounds. With random
weights at full size the answer means nothing, and the work is that of the real model.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from full_shape import append_line, commit, make
from PIL import Image

from kimi_lite.bench import machine
from kimi_lite.runtime import kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", default=Path("full-shape-int4.gguf"), help="made if it is not there"
    )
    parser.add_argument("--mmproj", type=Path, help="the image side, if the file does not hold one")
    parser.add_argument("--side", type=int, default=896, help="pixels of the picture's sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    a = parser.parse_args()
    if not a.file.exists():
        make("packed", a.file)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = np.random.default_rng(1).integers(0, 256, (a.side, a.side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "picture.png")
        cache = folder / "cache"
        image_side = ["--mmproj", str(a.mmproj)] if a.mmproj else []
        ask = [sys.executable, "-m", "kimi_lite", "ask", "-m", str(a.file), *image_side, "--vram", "0"]
        environment = {**os.environ, "KIMI_LITE_IMAGE_CACHE": str(cache)}

        def seconds(question: str) -> float:
            start = time.perf_counter()
            command = [*ask, "--image", str(folder / "picture.png"), "--max-tokens", "1", question]
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            assert done.returncode in (0, 7), done.stderr.decode()  # 7: cut off by --max-tokens
            return time.perf_counter() - start

        seconds("Is the file in memory?")
        found: dict[str, list[float]] = {"new": [], "encoded": [], "read": []}
        for number in range(a.rounds):
            for row, forget in (("new", "*"), ("encoded", "*.latents"), ("read", "none")):
                for entry in cache.glob(forget):
                    entry.unlink()
                found[row].append(round(seconds(f"What is number {number} of {row}?"), 2))
        kept = {entry.suffix: entry.stat().st_size for entry in cache.iterdir()}
    for row, values in found.items():
        print(f"{row:<8} {statistics.median(values):6.2f} s   {values}")
    if a.json:
        record = {
            "bench": "second_question",
            "side": a.side,
            "seconds": found,
            "kept_bytes": kept,
            "threads": kernels.default_threads(),
            "isa": kernels.isa(),
            "commit": commit(),
            **machine(),
        }
        append_line(a.json, record)


if __name__ == "__main__":
    main()
