"""Does the card do what docs/gpu.md says that it should? One command, half an hour, every open claim.

    python benchmarks/gpu.py FILE                                           a packed file; benchmarks/full_shape.py makes one
    python benchmarks/gpu.py FILE --llama-bench PATH --gguf FILE.gguf       beside llama.cpp's own CUDA build
    python benchmarks/gpu.py FILE --mmproj FULL-SHAPE-MMPROJ.gguf           pictures too; benchmarks/vision.py makes one

A card of any size stands for smaller ones: each cap (6, 8, 12 and 24 GB, as far as the card has them) is planned, loaded and
measured as `--vram` would have it. For each: the bits of the logits after a prompt and after each of some tokens, against
the CPU's; the memory taken; prefill; a picture; decoding at several depths, each with a context just long enough, as a person who
needs that depth would ask for. Depths are really prefilled. What the time does not reach, or memory does not hold, is said
to be not measured, which proves nothing. Ctrl-C, or a limit that ends it, leaves what was measured until then.

Bandwidths of this very card are measured through PyTorch if it is there with CUDA, else given with --card-read and
--pcie, else assumed; claims that need them are not judged by an assumption. How many products a second our kernels do there is
found from one step of 512 tokens with all that fits on the card, and held against longer prompts and smaller caps. llama.cpp is measured by its own `llama-bench`
with as few layers' experts on the CPU as fit the same cap.

Where bitsandbytes is installed, the largest cap is measured again at the first depth with each format of `--gpu-dense`:
whether the card passes the proof of it, what memory it takes, and how fast it decodes beside our own kernels.

Prints a table and the claims, and appends one JSON line to benchmarks/results/DATE-gpu.jsonl. On a simulated card
(KIMI_LITE_DEVICE) times are those of its virtual clock, and nothing is appended.
"""

import argparse
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from full_shape import commit
from gpu_claims import PATCHES, Row, Setting, judge
from numpy.typing import NDArray

import kimi_lite
from kimi_lite.bench import machine, random_tokens
from kimi_lite.errors import DoesNotFitError, KimiLiteError, UsageError
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.plan import measure_cpu
from kimi_lite.runtime import dense, kernels
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda import halves
from kimi_lite.runtime.cuda.device import MOST_STREAMED, MOST_TOKENS, DeviceMemoryError, DeviceWrongError
from kimi_lite.runtime.cuda.find import find_device
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.model import CpuModel
from kimi_lite.runtime.placement import MARGIN, gb, parse_size, predict, predict_prompt
from kimi_lite.runtime.speeds import ASSUMED, Speeds
from kimi_lite.runtime.vision import VisionWeights, encode, open_vision
from kimi_lite.runtime.weights import open_weights

RESULTS = Path(__file__).parent / "results"
SPARE = 64  # positions beyond a depth
LLAMA_SPARE = 600_000_000  # what llama.cpp takes beside weights and cache
LLAMA_TRIES = 3  # a layer's experts more on the CPU each time, if it fails


@dataclass
class Picture:
    """Noise of at most 4096 patches, the image tower, and what the CPU makes of it."""

    tower: VisionWeights
    canvas: NDArray[np.uint8]
    rows_MD: Float
    cpu_s: float

    @property
    def patches(self) -> int:
        return self.canvas.size // (3 * self.tower.config.patch_size**2)


def picture_of(side: GgufFile | Path) -> Picture:
    tower = open_vision(side)
    edge = math.isqrt(min(PATCHES, tower.image.token_limit)) // 2 * 2 * tower.config.patch_size
    canvas = np.random.default_rng(4).integers(0, 256, (edge, edge, 3)).astype(np.uint8)
    start = time.perf_counter()
    rows_MD = encode(tower, [canvas])[0]
    return Picture(tower, canvas, rows_MD, round(time.perf_counter() - start, 3))


class Bench:
    """Measures rows until the time is up."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.until = a, time.monotonic() + 60 * float(a.minutes)
        self.weights = open_weights(a.file)
        self.sizes = sizes_of(self.weights)
        device = find_device()
        self.simulated, self.card = isinstance(device, SimulatedDevice), device.name
        self.speeds, self.measured_card = self.find_speeds(device)
        self.free = device.free_bytes()
        device.close()
        side = a.mmproj or self.weights.image_side
        self.picture = picture_of(side) if side else None
        self.measured_arithmetic = False
        self.llama_build = ""  # as its own benchmark says
        self.prefill_tok_per_s = math.inf  # the last measured, to see whether a depth is within reach

    def find_speeds(self, device: object) -> tuple[Speeds, bool]:
        """Bandwidths, and whether the card's are its own."""
        if isinstance(device, SimulatedDevice):
            return device.speeds(), True
        speeds = measure_cpu(self.weights, ASSUMED)
        found = card_bandwidths()
        card_gb_s, pcie_gb_s = self.a.card_read or found[0], self.a.pcie or found[1]
        if card_gb_s and pcie_gb_s:
            return replace(speeds, card_gb_s=card_gb_s, pcie_gb_s=pcie_gb_s), True
        return speeds, False

    def find_arithmetic(self) -> None:
        """The card's products a second: so many that one step is predicted to take what it takes."""
        context = self.context(self.a.depths[0])
        n = min(MOST_TOKENS, context)
        cap = self.caps(self.a.depths[0])[-1]
        engine = Engine(self.a.file, context=context, vram=cap, threads=self.a.threads, prove=False)
        model, low, high = engine.model, 1.0, 1e7
        assert isinstance(model, HybridModel)
        model.plan = replace(model.plan, stream_from=None)  # whose copies would hide the card's time
        seconds = n / self.prefill(engine, self.clock(model), n)

        def predicted(gmac_s: float) -> float:
            return predict(model.plan, replace(self.speeds, card_gmac_s=gmac_s), T=n).seconds

        model.close()
        while high > 1.001 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if predicted(middle) > seconds else (low, middle)
        # Where reads and launches alone take as long, products have not been seen.
        self.measured_arithmetic = predicted(high) < 1.05 * seconds and predicted(high / 2) > 1.05 * seconds
        if self.measured_arithmetic:
            self.speeds = replace(self.speeds, card_gmac_s=round(high, 1))

    def caps(self, depth: int) -> list[int]:
        """Those that the card has room for, and before them one that leaves no room for a routed expert."""
        context = self.context(depth)
        least = self.sizes.fixed_bytes + self.sizes.cache_bytes(context) + self.sizes.workspace_bytes(context)
        caps = [math.ceil(least / (1 - MARGIN)) + 1000, *self.a.caps]
        return [cap for cap in caps if cap <= self.free]

    def context(self, depth: int) -> int:
        """At the first depth, the prompt is measured too."""
        longest: int = max(depth, self.a.prompt if depth == self.a.depths[0] else 0)
        return longest + int(self.a.tokens) + SPARE

    def measure(self, cap: int, depth: int, gpu_dense: str | None = None) -> Row:
        row, context = Row(cap, depth, gpu_dense=gpu_dense), self.context(depth)
        if context > self.weights.config.context_length:
            row.why_not = f"the model's context ends at {self.weights.config.context_length}"
        elif depth != self.a.depths[0] and self.left() < depth / self.prefill_tok_per_s:
            row.why_not = "no time was left"
        if row.why_not:
            return row
        started = time.perf_counter()
        try:
            engine = Engine(
                self.a.file,
                context=context,
                vram=cap,
                threads=self.a.threads,
                prove=gpu_dense is not None,
                gpu_dense=gpu_dense,
            )
        except DeviceWrongError as error:
            row.why_not, row.proven = str(error), False
            return row
        except (DoesNotFitError, UsageError) as error:
            row.why_not = str(error)
            return row
        model = engine.model
        assert isinstance(model, HybridModel)
        row.load_s = round(time.perf_counter() - started, 2)
        row.proven = None if gpu_dense is None else True
        row.taken = max(0, self.free - model.device.free_bytes())
        row.resident, row.experts = model.plan.n_resident, model.plan.n_experts
        clock = self.clock(model)
        if depth == self.a.depths[0]:
            row.bits = bits(engine, self.a.prompt, self.a.tokens)
            row.prefill = self.prefill(engine, clock, self.a.prompt)
            row.predicted_prefill = self.predicted_prefill(model)
            if (stream_from := model.plan.stream_from) is not None:
                n = min(stream_from * 3 // 2, context - 1)
                row.stream_from, row.streamed = stream_from, self.prefill(engine, clock, n)
                model.plan = replace(model.plan, stream_from=None)
                row.not_streamed = self.prefill(engine, clock, n)
                model.plan = replace(model.plan, stream_from=stream_from)
            if row.whole:
                row.prefill_by_eights = self.prefill_by_eights(engine, clock)
            self.encode(row, model, clock)
        engine.rewind(0)
        before, ids = time.monotonic(), random_tokens(engine, depth)
        for start in range(0, depth, MOST_STREAMED):
            engine.append(ids[start : start + MOST_STREAMED])
            if depth != self.a.depths[0] and self.left() < 0:
                model.close()
                row.why_not = f"the time was up after {len(engine.tokens)} tokens"
                return row
        self.prefill_tok_per_s = depth / (time.monotonic() - before)
        row.decode = self.decode(engine, clock)
        if not gpu_dense and 0 < row.resident < row.experts:
            row.decode_in_turn = self.decode_in_turn(engine, model, clock)
        row.taken = max(row.taken, self.free - model.device.free_bytes())  # PyTorch takes some while it works
        middle = depth + self.a.tokens // 2
        if gpu_dense:  # the planner speaks of our kernels
            row.predicted_prefill = None
            model.close()
            return row
        row.predicted_decode = round(predict(model.plan, self.speeds, start=middle).tok_per_s, 2)
        free_of_overhead = replace(self.speeds, launch_us=0, hand_off_us=0)
        row.ceiling = round(predict(model.plan, free_of_overhead, start=middle).tok_per_s, 2)
        read: float = self.sizes.fixed_bytes + self.sizes.cache_bytes(middle)
        read += sum(
            layer.n_active * layer.expert_bytes * hit
            for layer, hit in zip(self.sizes.layers, model.plan.hit, strict=True)
        )
        row.gb_per_s = round(read * row.decode / 1e9, 2)
        model.close()
        return row

    def clock(self, model: HybridModel) -> Callable[[], float]:
        device = model.device
        return (lambda: device.clock_s) if isinstance(device, SimulatedDevice) else time.perf_counter

    def decode_in_turn(self, engine: Engine, model: HybridModel, clock: Callable[[], float]) -> float:
        """Decoding from the same position on, in which the CPU begins a layer's experts when the card has done its own."""
        engine.rewind(len(engine.tokens) - self.a.tokens - 1)
        run_experts, replaced = model.device.run_experts, vars(model.device)

        def and_wait(index: int) -> None:
            run_experts(index)
            model.device.wait()

        replaced["run_experts"] = and_wait
        try:
            return self.decode(engine, clock)
        finally:
            del replaced["run_experts"]

    def prefill(self, engine: Engine, clock: Callable[[], float], n: int) -> float:
        seconds = []
        for _ in range(3):
            engine.rewind(0)
            start = clock()
            engine.append(random_tokens(engine, n))
            seconds.append(clock() - start)
        return round(float(n / statistics.median(seconds)), 2)

    def prefill_by_eights(self, engine: Engine, clock: Callable[[], float]) -> float:
        """The same with no step that is long enough for tiles."""
        settings = vars(halves)
        many, settings["MANY"] = settings["MANY"], MOST_TOKENS + 1
        try:
            return self.prefill(engine, clock, self.a.prompt)
        finally:
            settings["MANY"] = many

    def encode(self, row: Row, model: HybridModel, clock: Callable[[], float]) -> None:
        """The picture on the card, if it has room there; the first time may upload the tower."""
        if self.picture is None:
            return
        try:
            model.encode(self.picture.tower, [self.picture.canvas], prove=False)
            start = clock()
            (rows_MD,) = model.encode(self.picture.tower, [self.picture.canvas], prove=False)
        except DeviceMemoryError as error:
            print(f"{gb(row.cap)}: {error}", file=sys.stderr)
            return
        row.encode_s = round(clock() - start, 4)
        row.encode_bits = np.array_equal(rows_MD, self.picture.rows_MD)

    def predicted_prefill(self, model: HybridModel) -> float:
        return round(float(self.a.prompt / predict_prompt(model.plan, self.speeds, self.a.prompt)), 2)

    def decode(self, engine: Engine, clock: Callable[[], float]) -> float:
        """The mean over all tokens, as whoever waits for an answer has it."""
        ids = random_tokens(engine, self.a.tokens + 1, seed=2)
        engine.append(ids[:1])  # the first one may capture what the others launch
        start = clock()
        for token in ids[1:]:
            engine.append([token])
        return round(float(self.a.tokens / (clock() - start)), 2)

    def left(self) -> float:
        return self.until - time.monotonic()


def bits(engine: Engine, n_prompt: int, n: int) -> str:
    """A digest of the logits after a prompt and after each of the n likeliest tokens that follow."""
    digest = sha256()
    engine.rewind(0)
    logits_V = engine.append(random_tokens(engine, n_prompt, seed=3))
    for _ in range(n):
        digest.update(logits_V.tobytes())
        logits_V = engine.append([int(logits_V[: engine.n_named].argmax())])
    digest.update(logits_V.tobytes())
    return digest.hexdigest()


def card_bandwidths() -> tuple[float, float]:
    """GB/s of the card's memory and of PCIe from pinned memory, through PyTorch; zeros without it."""
    try:
        import torch
    except ImportError:
        return 0.0, 0.0
    if not torch.cuda.is_available():
        return 0.0, 0.0
    on_card = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    copied = 2 * on_card.numel() / seconds(on_card.clone) / 1e9  # read and written
    moved = pinned.numel() / seconds(lambda: on_card[: pinned.numel()].copy_(pinned)) / 1e9
    on_card = on_card.new_empty(0)
    torch.cuda.empty_cache()  # what PyTorch kept would count as taken by the models
    return round(copied, 1), round(moved, 1)


def llama_rows(bench: Bench, depth: int) -> Iterator[Row]:
    """llama-bench with all layers on the card and as few layers' experts on the CPU as fit each cap, or as run."""
    a, sizes = bench.a, bench.sizes
    n_moe = sum(layer.n_experts > 0 for layer in sizes.layers)
    experts = a.gguf.stat().st_size * sizes.routed_bytes / (sizes.routed_bytes + sizes.fixed_bytes) / n_moe
    for cap in bench.caps(depth):
        row = Row(cap, depth)
        over = a.gguf.stat().st_size + sizes.cache_bytes(depth) + LLAMA_SPARE - cap
        first = min(n_moe, max(0, math.ceil(over / experts)))
        for n_cpu in range(first, min(n_moe, first + LLAMA_TRIES - 1) + 1):
            row.why_not = ""
            if depth == a.depths[0]:
                row.prefill = llama_speed(
                    bench, row, n_cpu, "-p", a.prompt, "-n", 0, "-d", 0, "-ub", "512,2048"
                )
            hosts = ("--no-host", "0,1") if n_cpu else ()  # whether the CPU's experts may be repacked
            row.decode = llama_speed(bench, row, n_cpu, "-p", 0, "-n", a.tokens, "-d", depth, *hosts)
            if not row.why_not:
                break
        yield row


def llama_speed(bench: Bench, row: Row, n_cpu: int, *test: object) -> float | None:
    """Tokens a second of a test's best setting, with the experts of `n_cpu` layers on the CPU; or why not, in `row`."""
    a = bench.a
    command = [
        a.llama_bench,
        "-m",
        a.gguf,
        "-ngl",
        99,
        "-ncmoe",
        n_cpu,
        "-fa",
        1,
        "-r",
        2,
        *test,
        "-o",
        "json",
    ]
    try:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=False,
            timeout=max(60, bench.left()),
        )
    except subprocess.TimeoutExpired:
        row.why_not = "no time was left"
        return None
    if done.returncode:
        row.why_not = (done.stderr.strip().splitlines() or ["llama-bench failed"])[-1]
        return None
    tests = json.loads(done.stdout)
    bench.llama_build = f"{tests[0]['build_commit']}, build {tests[0]['build_number']}"
    return round(max(float(test["avg_ts"]) for test in tests), 2)


def card_facts() -> str:
    """What nvidia-smi says: name, driver, memory, PCIe, power limit; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cpu_decoding(a: argparse.Namespace) -> tuple[str, float]:
    """The bits that all placements must have, and what the CPU alone does at the first depth."""
    depth = a.depths[0]
    engine = Engine(a.file, context=max(a.prompt, depth) + SPARE, threads=a.threads)
    engine.model = CpuModel(engine.weights, engine.context, expanded=False)  # as a card's attention is
    digest = bits(engine, a.prompt, a.tokens)
    engine.rewind(min(depth, len(engine.tokens)))
    start = time.perf_counter()
    for token in random_tokens(engine, a.tokens, seed=2):
        engine.append([token])
    return digest, round(a.tokens / (time.perf_counter() - start), 2)


def show(rows: Sequence[Row], title: str) -> None:
    print(
        f"\n{title}\n{'cap':>9} {'after':>7} {'experts':>11} {'prefill':>9} {'decode':>8} {'predicted':>9} {'ceiling':>8}"
    )
    for r in rows:
        speeds = " ".join(
            f"{value if value is not None else '-':>{width}}"
            for value, width in ((r.prefill, 9), (r.decode, 8), (r.predicted_decode, 9), (r.ceiling, 8))
        )
        held = f"{r.resident}/{r.experts}" if r.experts else "-"
        print(f"{gb(r.cap):>9} {r.depth:>7} {held:>11} {speeds} {r.why_not}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = lambda text: [parse_size(size, "--caps") for size in text.split(",")]  # noqa: E731
    numbers = lambda text: sorted(int(n) for n in text.split(","))  # noqa: E731
    parser.add_argument("file", type=Path)
    parser.add_argument("--caps", type=sizes, default="6G,8G,12G,24G")
    parser.add_argument("--depths", type=numbers, default="4096,32768,130000")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--card-read", type=float, help="GB/s of the card's memory, if PyTorch cannot measure it"
    )
    parser.add_argument("--pcie", type=float, help="GB/s between processor and card")
    parser.add_argument("--mmproj", type=Path, help="an image tower for the pictures, if FILE has none")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's own benchmark, built with CUDA")
    parser.add_argument("--gguf", type=Path, help="the file for it")
    a = parser.parse_args(arguments)
    if a.llama_bench and shutil.which(a.llama_bench) is None:
        parser.error(f"--llama-bench is {a.llama_bench}, which does not run; name llama.cpp's own benchmark")
    if a.gguf and not a.gguf.is_file():
        parser.error(f"--gguf is {a.gguf}, which is no file; benchmarks/full_shape.py makes one")
    kernels.set_threads(a.threads)
    bench = Bench(a)
    print(f"{bench.card}, {gb(bench.free)} free; {card_facts() or 'no nvidia-smi'}", file=sys.stderr)
    cpu_bits, cpu_decode = cpu_decoding(a)
    rows, llama = list[Row](), list[Row]()
    depth, others, cut_off = a.depths[0], list[Row](), False
    try:
        if not bench.simulated:
            bench.find_arithmetic()
        for each in a.depths:
            for cap in bench.caps(each):
                rows.append(row := bench.measure(cap, each))
                print(f"{gb(cap)} after {each}: {row.why_not or row.decode}", file=sys.stderr)
            if a.llama_bench and a.gguf:
                llama += llama_rows(bench, each)
        for layout in dense.LAYOUTS if not dense.why_not() else ():
            others.append(row := bench.measure(bench.caps(depth)[-1], depth, layout))
            print(f"dense weights in {layout}: {row.why_not or row.decode}", file=sys.stderr)
    except KeyboardInterrupt:
        cut_off = True
        print("cut off; what follows is what was measured until then", file=sys.stderr)
    picture = bench.picture
    setting = Setting(
        card=bench.card,
        first_depth=depth,
        prompt=a.prompt,
        speeds=bench.speeds,
        known=bench.measured_card,
        arithmetic=bench.simulated or bench.measured_arithmetic,
        simulated=bench.simulated,
        cpu_bits=cpu_bits,
        cpu_decode=cpu_decode,
        cpu_encode_s=picture.cpu_s if picture and picture.patches == PATCHES else None,
    )
    claims = judge(setting, rows, llama, others)
    clock = (
        "of a simulated card: its clock is virtual, and says nothing of any real one"
        if bench.simulated
        else bench.card
    )
    show(rows, f"kimi-lite, {clock}")
    if llama:
        show(llama, "llama.cpp")
    for row in others:
        show([row], f"kimi-lite with --gpu-dense {row.gpu_dense}, {clock}")
    print()
    for claim in claims:
        print(f"{claim.verdict:12}  {claim.says}  {'; '.join(claim.evidence)}")
    result = {
        "schema": "kimi-lite-gpu/1",
        "cut_off": cut_off,
        "simulated": bench.simulated,
        "card": bench.card,
        "card_facts": card_facts(),
        "machine": machine(),
        "versions": {
            "kimi-lite": kimi_lite.__version__,
            "commit": commit(),
            "numpy": np.__version__,
            "llama.cpp": bench.llama_build,
        },
        "file": a.file.name,
        "speeds": asdict(bench.speeds),
        "card_speeds_measured": bench.measured_card,
        "card_arithmetic_measured": bench.measured_arithmetic,
        "cpu_decode": cpu_decode,
        "rows": [asdict(row) for row in rows],
        "llama": [asdict(row) for row in llama],
        "gpu_dense": [asdict(row) for row in others],
        "claims": [asdict(claim) for claim in claims],
    }
    line = json.dumps(result)
    print(line)
    if not bench.simulated:
        with (RESULTS / f"{date.today()}-gpu.jsonl").open("a", encoding="utf-8") as out:
            out.write(line + "\n")
    return result


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KimiLiteError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
