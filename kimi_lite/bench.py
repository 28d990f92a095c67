"""How fast does a model run here, in how much memory, and how far is that from what the machine allows?

Prefill is arithmetic: tokens a second of a prompt, for several lengths. Decoding is memory traffic: each token reads
the weights of the experts that it goes through, and the cached rows of all tokens before it, once. Nothing can decode
faster than those bytes can be read, so a plain read of the same mapped file by as many threads is timed every few
tokens, and each decoding speed is also given as a share of it. (In between, because on shared machines the speed of
memory was seen to change by half from one second to the next.)

A deep context is not computed but made up (`fill_cache`): attention does the same work whatever the rows say; on a card it
is prefilled. Tokens are random, so that a prompt needs more of the experts than text on one subject does. What a card
reads cannot be held against a plain read of the CPU's, so there decoding comes without that share.

Dimension key:  S cached positions   C latent   R rope
"""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import kimi_lite
from kimi_lite.errors import UsageError
from kimi_lite.formats.config import TextConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel

PROMPTS, DEPTHS, DECODED = (256, 2048), (0, 4096), 32
READ_BYTES = 1 << 30  # more than processors' caches hold, and read in less than a tenth of a second
READ_EVERY = 8  # decoded tokens between two readings
SAMPLE_S = 2.0  # a prompt is run again, up to five times in all, until this long was measured


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes: what the process holds of its own, and pages of mapped files, which all processes share."""

    anonymous: int
    mapped: int


@dataclass(frozen=True)
class Speed:
    """One measured row. `n` tokens were prefilled from nothing, or decoded one by one at `depth`."""

    kind: str  # prefill or decode
    threads: int
    depth: int
    n: int
    tok_per_s: float  # the median
    p10: float
    p90: float
    bytes_per_token: int | None  # of weights and cache, for decoding
    gb_per_s: float | None
    read_gb_per_s: float | None  # of a plain read, the median of those between the tokens
    fraction_of_read: float | None
    memory: Memory


@dataclass(frozen=True)
class Report:
    """What `kimi-lite bench` prints."""

    file: str
    file_bytes: int
    placement: str
    layers: int
    load_s: float
    large_pages: (
        float | None
    )  # the share of the mapped file that lies in pages of 2 MB, where the system tells
    weight_bytes_per_token: int
    cache_bytes_per_token: int
    machine: dict[str, Any]
    versions: dict[str, str]
    isa: str
    rows: list[Speed]

    def as_json(self) -> dict[str, Any]:
        return {"schema": "kimi-lite-bench/1", **asdict(self)}


def measure(
    path: Path,
    *,
    prompts: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    decode: int = DECODED,
    threads: Sequence[int | None] = (None,),
    context: int | None = None,
    vram: int | None = 0,
    gpu_dense: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Open a model file and measure it: each prompt length and each depth, for each number of threads.

    Args:
        prompts, depths: by default 256 and 2048 tokens, and 0 and 4096, where the model's context allows them.
        decode: tokens to decode at each depth; 0 for none.
        context: tokens to reserve; by default what the longest row needs.
        vram: bytes of a card's memory that may be taken; 0 for the CPU alone, None for a card if one works.
        gpu_dense: a format in which bitsandbytes multiplies the dense weights on the card.
        progress: told what is measured next.

    Raises:
        ModelFileError: the file is missing, damaged or another model's.
        UsageError: a number that is out of range, or a context that is too short for what was asked.
        DoesNotFitError: the card or `vram` is too small.
    """
    limit = TextConfig.from_gguf(GgufFile(path).metadata, str(path)).context_length
    for n_threads in threads:
        kernels.set_threads(n_threads)  # a wrong one is better said before the first measurement than after
    prompts = [n for n in PROMPTS if n <= limit] if prompts is None else list(prompts)
    depths = [n for n in DEPTHS if n + decode <= limit] if depths is None else list(depths)
    if min([1, *prompts]) < 1 or min([0, *depths]) < 0 or decode < 0:
        raise UsageError("a prompt has at least 1 token, and a depth and the tokens to decode are at least 0")
    needed = max([1, *prompts, *(depth + decode for depth in depths if decode)])
    if needed > (context or limit):
        raise UsageError(
            f"the longest row needs a context of {needed} tokens, but there are {context or limit}; "
            f"ask for less, or for more with --context (this model: up to {limit})"
        )
    started = time.perf_counter()
    engine = Engine(path, context=context or needed, threads=threads[0], vram=vram, gpu_dense=gpu_dense)
    load_s = time.perf_counter() - started
    rows = list[Speed]()
    for n_threads in threads:
        kernels.set_threads(n_threads)
        used = kernels.threads()
        warm_up(engine)
        for n in prompts:
            progress(f"prefill of {n} tokens, {used} threads")
            rows.append(prefill_speed(engine, n))
        for depth in depths if decode else ():
            progress(f"decoding after {depth} tokens, {used} threads")
            rows.append(decode_speed(engine, depth, decode))
    config = engine.weights.config
    return Report(
        file=path.name,
        file_bytes=path.stat().st_size,
        placement=engine.placement,
        layers=config.n_layers,
        load_s=round(load_s, 3),
        large_pages=large_pages(path),
        weight_bytes_per_token=engine.weights.step_bytes(1),
        cache_bytes_per_token=LatentCache.bytes_per_token(config),
        machine=machine(),
        versions={
            "kimi-lite": kimi_lite.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        isa=kernels.isa(),
        rows=rows,
    )


def prefill_speed(engine: Engine, n: int) -> Speed:
    """Of a prompt of n random tokens from an empty cache."""
    prompt, seconds = random_tokens(engine, n), list[float]()
    with PeakMemory() as memory:
        while len(seconds) < 5 and sum(seconds) < SAMPLE_S:
            engine.rewind(0)
            start = time.perf_counter()
            engine.append(prompt)
            seconds.append(time.perf_counter() - start)
    p10, p50, p90 = _percentiles([n / s for s in seconds])
    return Speed("prefill", kernels.threads(), 0, n, p50, p10, p90, None, None, None, None, memory.peak)


def decode_speed(engine: Engine, depth: int, n: int) -> Speed:
    """Of n tokens, one by one, after a cache of `depth`."""
    fill_cache(engine, depth)
    seconds, reading = list[float](), list[float]()
    if isinstance(engine.model, HybridModel):
        with PeakMemory() as memory:
            for token in random_tokens(engine, n):
                start = time.perf_counter()
                engine.append([token])
                seconds.append(time.perf_counter() - start)
        p10, p50, p90 = _percentiles([1 / s for s in seconds])
        return Speed(
            "decode", kernels.threads(), depth, n, p50, p10, p90, None, None, None, None, memory.peak
        )
    with Reader(engine, kernels.threads()) as reader, PeakMemory() as memory:
        for i, token in enumerate(random_tokens(engine, n)):
            if i % READ_EVERY == 0:
                reading.append(reader.gb_per_s())
            start = time.perf_counter()
            engine.append([token])
            seconds.append(time.perf_counter() - start)
    p10, p50, p90 = _percentiles([1 / s for s in seconds])
    moved = engine.weights.step_bytes(1) + (depth + n // 2) * LatentCache.bytes_per_token(
        engine.weights.config
    )
    read, used = statistics.median(reading), moved * p50 / 1e9
    traffic = moved, round(used, 2), round(read, 2), round(used / read, 3)
    return Speed("decode", kernels.threads(), depth, n, p50, p10, p90, *traffic, memory.peak)


def fill_cache(engine: Engine, n: int) -> None:
    """Make the cache n tokens deep: with random rows, or over a card with those of random tokens."""
    engine.rewind(0)
    if isinstance(engine.model, HybridModel):
        if n:
            engine.append(random_tokens(engine, n))
        return
    config = engine.weights.config
    width = config.kv_rank + config.rope_dim
    tile_SX = np.random.default_rng(0).standard_normal((256, width), np.float32)
    for layer in engine.model.cache.layers:
        for start in range(0, n, 256):
            kernels.remember(layer, tile_SX[: n - start], start)
    engine.model.cache.n, engine.tokens, engine.places = n, [0] * n, [None] * n


def random_tokens(engine: Engine, n: int, seed: int = 1) -> list[int]:
    """Ordinary tokens, none of them special."""
    ids_T = np.random.default_rng(seed).integers(0, len(engine.weights.vocab.ranks), n)
    return [int(i) for i in ids_T]


def warm_up(engine: Engine) -> None:
    """Bring in the pages of most experts and start all threads, and leave the cache empty."""
    engine.rewind(0)
    engine.append(random_tokens(engine, min(64, engine.context), seed=0))
    engine.rewind(0)


class Reader:
    """Times a plain read of a model's mapped bytes, from memory, with some number of threads.

    numpy's sum of 64-bit words runs without Python's lock and came out no slower than its other reductions or a C loop
    of 64-byte loads with prefetching (docs/lab-log.md).
    """

    def __init__(self, engine: Engine, threads: int) -> None:
        whole = engine.weights.head.data
        while isinstance(whole.base, np.ndarray):  # a view of the whole map
            whole = whole.base
        words = whole[: whole.size // 8 * 8].view(np.uint64)[-READ_BYTES // 8 :]
        self._parts = np.array_split(words, threads * min(8, 1 + words.nbytes // (threads << 23)))
        self._pool, self._n_bytes = ThreadPoolExecutor(threads), words.nbytes
        self.gb_per_s()  # bring the pages in

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def gb_per_s(self) -> float:
        """The better of two passes: in the first, threads may have to wake up."""
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            list(self._pool.map(np.add.reduce, self._parts))
            seconds.append(time.perf_counter() - start)
        return self._n_bytes / min(seconds) / 1e9


class PeakMemory(threading.Thread):
    """Looks ten times a second at how much memory this process uses, and keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process, self._finished = psutil.Process(), threading.Event()
        self.peak = Memory(0, 0)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._finished.set()
        self.join()
        self._look()

    def run(self) -> None:
        while not self._finished.wait(0.1):
            self._look()

    def _look(self) -> None:
        now = memory_now(self._process)
        self.peak = Memory(max(self.peak.anonymous, now.anonymous), max(self.peak.mapped, now.mapped))


def memory_now(process: psutil.Process) -> Memory:
    """What the process has in memory now."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        anonymous, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return Memory(anonymous, mapped)
    full = process.memory_full_info()  # elsewhere: memory of its own, and the rest
    return Memory(full.uss, max(0, full.rss - full.uss))


def large_pages(path: Path, maps: Path = Path("/proc/self/smaps")) -> float | None:
    """The share of what this process has mapped of a file that lies in pages of 2 MB; None where that is not known."""
    mapped, large, ours = 0, 0, False
    if not maps.exists():
        return None
    for line in maps.read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name:  # where the next map begins
            ours = line.endswith(str(path.resolve()))
        elif ours and name == "Rss":
            mapped += int(value.split()[0])
        elif ours and name == "FilePmdMapped":
            large += int(value.split()[0])
    return round(large / mapped, 3) if mapped else None


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def table(report: Report) -> Iterator[str]:
    """The lines that people read."""
    m, version = report.machine, report.versions
    yield (
        f"{report.file}: {report.file_bytes / 1e9:.2f} GB, {report.layers} layers, opened in {report.load_s:.1f} s; a "
        f"decoded token reads {report.weight_bytes_per_token / 1e9:.3f} GB of weights and "
        f"{report.cache_bytes_per_token / 1e3:.1f} kB for each token before it"
    )
    yield f"runs on {report.placement}"
    if report.large_pages is not None:
        slower = "" if report.large_pages > 0.9 else "; decoding is slower with small ones (docs/kernels.md)"
        yield f"{report.large_pages:.0%} of the mapped file lie in large pages{slower}"
    yield f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}"
    yield f"kimi-lite {version['kimi-lite']} with {report.isa}, Python {version['python']}, numpy {version['numpy']}"
    yield ""
    yield (
        f"{'threads':>7}  {'':7} {'tokens':>6} {'after':>6}  {'tok/s':>7} {'p10–p90':>15}  {'GB a token':>10} "
        f"{'GB/s':>6} {'reading':>7} {'share':>6}  {'own memory':>10} {'mapped file':>11}"
    )
    for row in report.rows:
        traffic = " " * 32
        if row.bytes_per_token is not None:
            traffic = (
                f"{row.bytes_per_token / 1e9:10.3f} {row.gb_per_s:6.1f} {row.read_gb_per_s:7.1f} "
                f"{row.fraction_of_read:6.0%}"
            )
        yield (
            f"{row.threads:7}  {row.kind:7} {row.n:6} {row.depth:6}  {row.tok_per_s:7.1f} "
            f"{f'{row.p10:.1f}–{row.p90:.1f}':>15}  {traffic}  {row.memory.anonymous / 1e9:7.2f} GB "
            f"{row.memory.mapped / 1e9:8.2f} GB"
        )
    if any(row.read_gb_per_s for row in report.rows):
        yield ""
        yield "reading: GB/s of a plain read of the same mapped file with as many threads, timed between the tokens"


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return (
        round(ordered[round(last * 0.1)], 2),
        round(statistics.median(ordered), 2),
        round(ordered[round(last * 0.9)], 2),
    )
