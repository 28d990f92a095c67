"""One engine in one process: what benchmarks/peers.py starts to measure kimi-lite, llama.cpp or ik_llama.cpp.

    python benchmarks/peer_worker.py '{"engine": "llama", "file": "model.gguf", "rows": ["prefill_256", "decode"], ...}'

All engines answer to the same three calls and are timed by the same lines below. Nothing but the standard library is
needed, so it also runs under an interpreter that has the peers and not kimi-lite. The last line printed is one JSON
object.

A deep context without hours of prefill: kimi-lite's cache is filled with random rows. A peer's own state after 256
tokens of real prefill is repeated until it is as long as asked, and loaded through its own interface; attention does
the same work whatever the rows say.
"""

import ctypes
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

N_PLAIN = 163000  # ids below are ordinary tokens
PROMPT = 256  # tokens in front of a decode at short context, and of the state that a deep one is made from
DECODED = 32
NOT_NUMBERS = "the logits are not numbers; the file is not fit for a measurement"


class Engine(Protocol):
    """What is asked of an engine. `append` returns when the logits after the last token are there."""

    version: str

    def append(self, ids: list[int]) -> None: ...
    def rewind(self, n: int) -> None: ...
    def deepen(self, n: int) -> None: ...


class Ours:
    """kimi-lite."""

    def __init__(self, job: dict[str, Any]) -> None:
        import kimi_lite
        from kimi_lite.runtime import kernels
        from kimi_lite.runtime.engine import Engine as Runtime

        self.runtime = Runtime(Path(job["file"]), context=job["context"], threads=job["threads"])
        self.version = f"kimi-lite {kimi_lite.__version__}, {kernels.isa()}"

    def append(self, ids: list[int]) -> None:
        logit = self.runtime.append(ids)[0]
        if logit != logit:
            raise SystemExit(NOT_NUMBERS)

    def rewind(self, n: int) -> None:
        self.runtime.rewind(n)

    def deepen(self, n: int) -> None:
        from kimi_lite.bench import fill_cache

        fill_cache(self.runtime, n)

    def read_speed(self) -> float:
        """GB/s of a plain read of the file's last bytes by as many threads."""
        from kimi_lite.bench import Reader
        from kimi_lite.runtime import kernels

        with Reader(self.runtime, kernels.threads()) as reader:
            return reader.gb_per_s()

    def fraction_of_read(self) -> float:
        """Bytes a second of decoding over those of a plain read in between, as `kimi-lite bench` measures them."""
        from kimi_lite.bench import decode_speed

        return decode_speed(self.runtime, PROMPT, DECODED).fraction_of_read or 0.0


class Peer:
    """What llama.cpp and ik_llama.cpp have in common: llama_batch, llama_decode, llama_get_logits_ith."""

    version = ""
    state_head, state_cell = (
        0,
        2,
    )  # int32 words in a saved state: before its count of cells, and for each cell

    def __init__(self, api: Any, model: int | None, parameters: Any, job: dict[str, Any]) -> None:
        if not model:
            raise SystemExit(f"{job['engine']} could not load {job['file']}")
        parameters.n_ctx = job["context"]
        parameters.n_batch = self.n_batch = max(512, job["ubatch"])
        parameters.n_ubatch = job["ubatch"]
        parameters.n_threads = parameters.n_threads_batch = job["threads"]
        self.context = api.llama_init_from_model(model, parameters)
        if not self.context:
            raise SystemExit(f"{job['engine']} could not make a context of {job['context']} tokens")
        self.api, self.n = api, 0
        self.batch = api.llama_batch_init(self.n_batch, 0, 1)

    def append(self, ids: list[int]) -> None:
        for start in range(0, len(ids), self.n_batch):
            part = ids[start : start + self.n_batch]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, self.n + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = int(start + i + 1 == len(ids))
            if code := self.api.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama_decode returned {code} for {len(part)} tokens after {self.n}")
            self.n += len(part)
        logit = self.api.llama_get_logits_ith(self.context, -1)[0]
        if logit != logit:
            raise SystemExit(NOT_NUMBERS)

    def rewind(self, n: int) -> None:
        self.forget(n)
        self.n = n

    def deepen(self, n: int) -> None:
        self.rewind(0)
        self.append(tokens(PROMPT))
        state = repeat_state(self.state(), PROMPT, n, self.state_head, self.state_cell)
        self.rewind(0)
        self.load(state)
        self.n = n

    def forget(self, n: int) -> None:
        raise NotImplementedError

    def state(self) -> bytes:
        raise NotImplementedError

    def load(self, state: bytes) -> None:
        raise NotImplementedError


class Llama(Peer):
    """llama.cpp through llama-cpp-python's low-level interface."""

    state_head, state_cell = 3, 3

    def __init__(self, job: dict[str, Any]) -> None:
        from importlib.metadata import version

        from llama_cpp import llama_cpp as api

        quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(quiet, None)
        self.keep = quiet
        self.version = (
            f"llama-cpp-python {version('llama-cpp-python')}: {api.llama_print_system_info().decode()}"
        )
        api.llama_backend_init()
        wanted = api.llama_model_default_params()
        wanted.use_extra_bufts = job["repack"]
        model = api.llama_model_load_from_file(str(job["file"]).encode(), wanted)
        parameters = api.llama_context_default_params()
        parameters.flash_attn_type = int(job["flash"])
        super().__init__(api, model, parameters, job)

    def forget(self, n: int) -> None:
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, n, -1)

    def state(self) -> bytes:
        size = self.api.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, buffer, size, 0)
        return bytes(buffer)

    def load(self, state: bytes) -> None:
        pointer = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))
        if self.api.llama_state_seq_set_data(self.context, pointer, len(state), 0) != len(state):
            raise SystemExit("llama.cpp did not take the repeated state; its layout has changed")


class Ik(Peer):
    """ik_llama.cpp through ik-llama-cpp-python: latent cache form 3 and fused experts, which are its defaults too."""

    def __init__(self, job: dict[str, Any]) -> None:
        from importlib.metadata import version

        from ik_llama_cpp import _ctypes_api as api

        self.library = library = api._lib
        pointer, word, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
        for name, result, *arguments in (
            ("llama_kv_cache_seq_rm", ctypes.c_bool, pointer, word, word, word),
            ("llama_state_seq_get_size", size, pointer, word, ctypes.c_uint32),
            ("llama_state_seq_get_data", size, pointer, pointer, size, word, ctypes.c_uint32),
            ("llama_state_seq_set_data", size, pointer, pointer, size, word, ctypes.c_uint32),
            ("llama_print_system_info", ctypes.c_char_p),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.version = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}: {library.llama_print_system_info().decode()}"
        api.llama_backend_init()
        wanted = api.llama_model_default_params()
        wanted.repack_tensors, wanted.use_mmap, wanted.mla = job["repack"], not job["repack"], 3
        wanted.flash_attn = job["flash"]
        model = api.llama_model_load_from_file(str(job["file"]).encode(), wanted)
        parameters = api.llama_context_default_params()
        parameters.mla_attn, parameters.fused_moe_up_gate, parameters.flash_attn = 3, True, job["flash"]
        super().__init__(api, model, parameters, job)

    def forget(self, n: int) -> None:
        self.library.llama_kv_cache_seq_rm(self.context, 0, n, -1)

    def state(self) -> bytes:
        size = self.library.llama_state_seq_get_size(self.context, 0, 0)
        buffer = ctypes.create_string_buffer(size)
        self.library.llama_state_seq_get_data(self.context, buffer, size, 0, 0)
        return buffer.raw

    def load(self, state: bytes) -> None:
        if self.library.llama_state_seq_set_data(self.context, state, len(state), 0, 0) != len(state):
            raise SystemExit("ik_llama.cpp did not take the repeated state; its layout has changed")


def open_engine(job: dict[str, Any]) -> Engine:
    if job["engine"] == "ours":
        return Ours(job)
    return Llama(job) if job["engine"] == "llama" else Ik(job)


def repeat_state(state: bytes, n: int, target: int, head: int, cell: int) -> bytes:
    """The saved state of n positions made into one of `target` positions by repeating its rows.

    Layout, in int32 words: `head` words; the count of cells; `cell` words a cell, of which the first is its position;
    two words, the second the number of layers; then for each layer a type, the row size as int64, and the rows.
    """
    at = 4 * head
    assert struct.unpack_from("<i", state, at)[0] == n, "the count of cells is not where it was expected"
    out = [state[:at], struct.pack("<i", target)]
    first = at + 4
    rest = state[first + 4 : first + 4 * cell]
    out += [struct.pack("<i", position) + rest for position in range(target)]
    at = first + 4 * cell * n
    out.append(state[at : at + 8])
    n_layers, at = struct.unpack_from("<i", state, at + 4)[0], at + 8
    for _ in range(n_layers):
        size = struct.unpack_from("<q", state, at + 4)[0]
        rows = state[at + 12 : at + 12 + n * size]
        whole, part = divmod(target, n)
        out += [state[at : at + 12], rows * whole, rows[: part * size]]
        at += 12 + n * size
    return b"".join([*out, state[at:]])


def tokens(n: int) -> list[int]:
    return [random.randrange(N_PLAIN) for _ in range(n)]


def prefill(engine: Engine, n: int) -> float:
    """Tokens a second of a prompt of n tokens from an empty cache."""
    prompt = tokens(n)
    engine.rewind(0)
    start = time.perf_counter()
    engine.append(prompt)
    return n / (time.perf_counter() - start)


def decode(engine: Engine, n: int) -> float:
    """Tokens a second of n more, one by one."""
    ids = tokens(n)
    engine.append(tokens(1))  # the first after a prompt lets threads change their work
    start = time.perf_counter()
    for token in ids:
        engine.append([token])
    return n / (time.perf_counter() - start)


@contextmanager
def busy_core() -> Iterator[None]:
    """Another program that never sleeps."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        try:
            yield
        finally:
            other.kill()


class Memory(threading.Thread):
    """Watches how much memory of its own and of mapped files this process uses at most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0
        self.watching = threading.Event()
        self.watching.set()

    def look(self) -> None:
        if not self.watching.is_set():
            return
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "RssAnon":
                self.anonymous = max(self.anonymous, int(value.split()[0]) * 1024)
            elif name == "RssFile":
                self.mapped = max(self.mapped, int(value.split()[0]) * 1024)

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.1)


def measure(engine: Engine, rows: list[str], memory: Memory) -> Iterator[tuple[str, float]]:
    """One number a row: tokens a second."""
    prefill(engine, PROMPT)  # touch every page and start every thread
    for row in rows:
        kind, _, size = row.partition("_")
        if kind == "prefill":
            yield row, prefill(engine, int(size))
        elif row == "read_fraction":
            assert isinstance(engine, Ours)
            yield row, engine.fraction_of_read()
        elif row == "busy":
            prefill(engine, PROMPT)
            with busy_core():
                yield row, decode(engine, DECODED)
        else:  # decode, or decode_DEPTH
            if size:
                memory.watching.clear()  # the state's copies are ours, not the engine's
                engine.deepen(int(size))
                memory.watching.set()
            else:
                prefill(engine, PROMPT)
            yield row, decode(engine, DECODED)


def take_turns(engine: Engine) -> None:
    """One row for each line of standard input, until it ends."""
    prefill(engine, PROMPT)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, _, size = line.strip().partition("_")
        if kind == "read":
            assert isinstance(engine, Ours)
            speed = engine.read_speed()
        elif kind == "prefill":
            speed = prefill(engine, int(size))
        else:
            engine.rewind(PROMPT)
            speed = decode(engine, DECODED // 2)
        print(speed, flush=True)


def large_pages() -> int:
    """Bytes of this process, its own and mapped, that lie in large pages."""
    sums = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(sums.get(name, "0 kB").split()[0]) for name in ("AnonHugePages", "FilePmdMapped")) * 1024


def main() -> None:
    job = json.loads(sys.argv[1])
    memory = Memory()
    if job.get("rows") == ["first"]:
        open_engine(job).append(tokens(16))
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
        print(json.dumps({"first": time.clock_gettime(time.CLOCK_BOOTTIME) - started}), flush=True)
        os._exit(0)
    if job.get("turns"):
        take_turns(open_engine(job))
        os._exit(0)
    memory.start()
    start = time.perf_counter()
    engine = open_engine(job)
    result: dict[str, Any] = {"version": engine.version, "load_s": round(time.perf_counter() - start, 2)}
    for row, speed in measure(engine, job["rows"], memory):
        result[row] = round(speed, 3)
        print(row, result[row], file=sys.stderr, flush=True)
    memory.look()
    result |= {"anonymous_mb": memory.anonymous / 1e6, "mapped_mb": memory.mapped / 1e6}
    result["large_pages_mb"] = large_pages() / 1e6
    print(json.dumps(result), flush=True)
    os._exit(0)  # freeing gigabytes politely measures nothing


if __name__ == "__main__":
    main()
