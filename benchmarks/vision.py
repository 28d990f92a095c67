"""How fast is the image tower at full size, beside llama.cpp's, and in how much memory?

    python benchmarks/vision.py make DIR                a full-shape mmproj of random f16 weights (0.9 GB), and a small
                                                        text model of the same width, which llama.cpp wants beside it
    python benchmarks/vision.py ours DIR [SIDE]         encode one picture of SIDE × SIDE pixels (896: 4096 patches)
    python benchmarks/vision.py compare DIR PYTHON      ours and llama.cpp's mtmd in turn, same file, same picture;
                                                        PYTHON is an interpreter that has llama-cpp-python

A picture of P patches costs 27 layers of 4 (4 W² + 2 W F) P + 4 W P² flops, W = 1152, F = 4304: 5.5 TFLOP at 4096.
Multiply-adds of int8 (products) and int16 (attention) bound the time from below; `ours` measures what this machine's
kernels reach on each alone, and prints the encoder's share of it. Each ends with one JSON line.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

W, F, L, D = 1152, 4304, 27, 2048
MMPROJ, TEXT = "full-shape-mmproj.gguf", "width-2048.gguf"


def make(directory: Path) -> None:
    import numpy as np

    from kimi_lite.formats.config import ImageConfig, ModelConfig, VisionConfig
    from kimi_lite.formats.gguf_file import GgufWriter
    from kimi_lite.formats.safetensors_file import StoredTensor
    from kimi_lite.quantize.convert import quantize
    from kimi_lite.quantize.plan import Checkpoint, vision_metadata, vision_outputs
    from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, write_checkpoint

    directory.mkdir(parents=True, exist_ok=True)
    vision = VisionConfig(
        patch_size=14,
        grid_height=64,
        grid_width=64,
        n_heads=16,
        n_layers=L,
        hidden_size=W,
        ffn_size=F,
        merge=2,
    )
    text = replace(TINY_TEXT, hidden_size=D)

    class Shapes(Checkpoint):
        """A checkpoint of sizes only."""

        def __init__(self) -> None:
            self.config = ModelConfig(name="full-shape", text=text, vision=vision, image=ImageConfig())
            self.tensors, self.missing, self.misshapen, self._seen = {}, [], [], set()

        def tensor(self, name: str, *shape: int) -> StoredTensor | None:
            return None

    shapes, rng = Shapes(), np.random.default_rng(0)
    outputs = vision_outputs(shapes, "f16")
    with GgufWriter(
        directory / MMPROJ, vision_metadata(shapes, "f16"), [o.spec() for o in outputs]
    ) as writer:
        for output in outputs:
            values = rng.standard_normal(output.shape, dtype=np.float32)
            if output.name.endswith(".bias"):
                values *= 0.02
            elif len(output.shape) == 1:
                values = 1 + 0.1 * values
            elif "position" not in output.name:
                values *= np.float32(np.prod(output.shape[1:]) ** -0.5)
            writer.write(values.astype(np.float16 if output.type == "F16" else np.float32))
    checkpoint = write_checkpoint(directory / "text", text=text, vision=None)
    quantize(checkpoint, directory / TEXT, to="f16")


def flops(P: int) -> float:
    return (
        L * (2 * (4 * W * W + 2 * W * F) * P + 4 * W * P * P)
        + 2 * 588 * W * P
        + 2 * (16 * W * W + 4 * W * D) * P / 4
    )


class Watch:
    """Anonymous memory of this process, sampled: what a picture costs beside the mapped file."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def anonymous() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self.anonymous())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak


def ours(directory: Path, side: int, threads: int | None) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    from kimi_lite.formats.config import ImageConfig
    from kimi_lite.runtime import image, kernels
    from kimi_lite.runtime.vision import encode, open_vision

    kernels.set_threads(threads)
    config = ImageConfig(token_limit=16384)
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    before, watch = Watch.anonymous(), Watch()
    start = time.perf_counter()
    weights = open_vision(directory / MMPROJ)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    size, grid = image.plan((side, side), config)
    canvas = image.canvas(Image.fromarray(pixels), size, grid)
    process_s = time.perf_counter() - start
    shown = [0.0]

    def progress(share: float) -> None:
        if share >= shown[0] + 0.05:
            shown[0] = share
            print(f"\r{share:4.0%}", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    rows = encode(weights, [canvas], progress)[0]
    encode_s = time.perf_counter() - start
    peak = watch.stop()
    assert np.isfinite(rows).all()
    P = grid[0] * grid[1]
    product, attention = rates(weights)
    int8_peak = peak_int8(kernels.isa(), kernels.threads())
    mac = flops(P) / 2e9
    attended = L * 2 * W * P * P / 1e9
    return {
        "engine": "kimi-lite",
        "isa": kernels.isa(),
        "threads": kernels.threads(),
        "patches": P,
        "tokens": len(rows),
        "load_s": round(load_s, 2),
        "process_s": round(process_s, 3),
        "encode_s": round(encode_s, 2),
        "gmac_per_s": round(mac / encode_s, 1),
        "int8_product_alone": round(product, 1),
        "int16_attention_alone": round(attention, 1),
        "share_of_kernels": round(((mac - attended) / product + attended / attention) / encode_s, 3),
        "int8_peak": int8_peak and round(int8_peak, 1),
        "share_of_int8_peak": int8_peak and round(mac / encode_s / int8_peak, 3),
        "peak_extra_mb": round((peak - before) / 1e6),
    }


def rates(weights: Any) -> tuple[float, float]:
    """Billions of multiply-adds a second of one product (512 rows, W to F) and of one head's attention, alone."""
    import numpy as np

    from kimi_lite.runtime import _kernels, vision

    rng = np.random.default_rng(2)
    x = rng.standard_normal((512, W), dtype=np.float32)
    store = _kernels.PatchStore(4096, 2, 72)
    angle = np.ones((4096, 36), np.float32)
    store.place(
        0, rng.standard_normal((4096, 432), dtype=np.float32), np.zeros(432, np.float32), angle, angle
    )
    out = np.empty((1024, 144), np.float32)

    def best(call: Any) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    layer: vision.Linear = weights.blocks[0].fc0
    return 512 * W * F / best(lambda: layer(x)) / 1e9, 1024 * 4096 * 288 / best(
        lambda: store.attend(0, out)
    ) / 1e9


PEAK = """
#include <immintrin.h>
#define TEN(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9)
#define DECLARE(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a##i) : "v"(x));
#define SUM(i) x = _mm512_add_epi32(x, a##i);
int run(long n) {
  __m512i x = _mm512_set1_epi8(1);
  TEN(DECLARE)
  for (long k = 0; k < n; ++k) { TEN(STEP) }
  TEN(SUM)
  return _mm512_reduce_add_epi32(x);
}
"""


def peak_int8(isa: str, threads: int) -> float | None:
    """Billions of int8 multiply-adds a second that the processor can do at all: ten independent chains of vpdpbusd on
    every thread, compiled here. None without that instruction or a compiler."""
    if isa not in ("avx512vnni", "zen4"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(PEAK)
        flags = ["-O2", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-shared", "-fPIC"]
        try:
            subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        run = ctypes.CDLL(str(library)).run
        run.argtypes, n, best = [ctypes.c_long], 20_000_000, float("inf")
        for _ in range(3):
            workers = [threading.Thread(target=run, args=(n,)) for _ in range(threads)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            best = min(best, time.perf_counter() - start)
        return 64 * 10 * n * threads / best / 1e9


def peer(directory: Path, side: int, threads: int) -> dict[str, Any]:
    """llama.cpp's encoder through mtmd; runs in an interpreter that has llama-cpp-python."""
    import llama_cpp
    from llama_cpp import mtmd_cpp as mtmd

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(directory / TEXT).encode(), llama_cpp.llama_model_default_params()
    )
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = False
    parameters.n_threads = threads
    parameters.print_timings = False
    start = time.perf_counter()
    context = mtmd.mtmd_init_from_file(str(directory / MMPROJ).encode(), model, parameters)
    assert context, "mtmd did not open the mmproj file"
    load_s = time.perf_counter() - start
    import random

    data = random.Random(1).randbytes(side * side * 3)
    bitmap = mtmd.mtmd_bitmap_init(side, side, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))
    chunks = mtmd.mtmd_input_chunks_init()
    text = mtmd.mtmd_input_text()
    marker = mtmd.mtmd_default_marker()
    text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    status = mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1)
    assert status == 0, f"mtmd_tokenize gave {status}"
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            start = time.perf_counter()
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            encode_s = time.perf_counter() - start
            return {
                "engine": f"llama.cpp mtmd, llama-cpp-python {llama_cpp.__version__}",
                "threads": threads,
                "tokens": tokens,
                "load_s": round(load_s, 2),
                "encode_s": round(encode_s, 2),
                "gmac_per_s": round(flops(4 * tokens) / 2e9 / encode_s, 1),
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            }
    raise AssertionError("mtmd made no image chunk")


def compare(directory: Path, python: str, rounds: int) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for name, interpreter in (("ours", sys.executable), ("peer", python)):
            command = [interpreter, __file__, name, str(directory), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    best = {name: min(each, key=lambda run: run["encode_s"]) for name, each in runs.items()}
    spread = {name: [run["encode_s"] for run in each] for name, each in runs.items()}
    return {
        "bench": "vision",
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "ours": best["ours"],
        "peer": best["peer"],
        "encode_s": spread,
        "times_faster": round(best["peer"]["encode_s"] / best["ours"]["encode_s"], 2),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "ours", "peer", "compare"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("python", nargs="?", default=sys.executable, help="compare: the peer's interpreter")
    parser.add_argument("--side", type=int, default=896, help="pixels")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also append the JSON line to this file")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.directory)
        return
    if arguments.what == "ours":
        record = ours(arguments.directory, arguments.side, arguments.threads)
    elif arguments.what == "peer":
        record = peer(arguments.directory, arguments.side, arguments.threads or os.cpu_count() or 1)
    else:
        record = compare(arguments.directory, arguments.python, arguments.rounds)
    print(json.dumps(record))
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
