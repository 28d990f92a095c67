"""How does kimi-lite compare with llama.cpp and ik_llama.cpp, on this machine, in one run?

    python benchmarks/peers.py                      with the peers in this interpreter
    python benchmarks/peers.py --python VENV/bin/python --packed FILE --gguf FILE --deep

It makes the two files of random weights at full size unless they are there (benchmarks/full_shape.py): ours in the
default packed recipe, theirs in llama.cpp's Q4_K_M mix. Then every engine is measured in turn, in a process of its
own, for several rounds, so that a slow minute of the machine falls on all of them; medians are compared. Before each,
its file is read once, so that none pays for another having pushed it out of memory.

Where a machine changes its speed within minutes, --turns N says more: kimi-lite and the peer that was best at a row are
alive together, and take N turns of a second or two, of which each pair gives a ratio. Memory must hold both. What a plain read
reaches is measured before each pair: where a machine's memory has two speeds, the ratio of each is told apart by it.

A peer is given its best: the first round tries its settings (weights repacked at load or not, flash attention, batch),
and each row keeps the one that was fastest for it. A ready wheel may leave out instructions that the processor has, which
costs a peer up to a quarter of its speed: that is said and recorded. A peer that is not installed is named, with the way to install it, and
the others are still measured.

pip builds llama.cpp for the machine that it is on. Of ik_llama.cpp it takes a wheel for AVX2, and its source package (0.1.5)
lacks files that its quantizer needs. What is measured here can be built all the same, and put over the wheel's libraries:

    pip download --no-deps --no-binary :all: ik-llama-cpp-python && tar xf ik_llama_cpp_python-*.tar.gz
    cmake -S ik_llama_cpp_python-*/vendor/ik_llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
      -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN'
    cmake --build build --target llama ggml
    cp build/src/libllama.so build/ggml/src/libggml.so VENV/lib/python3.*/site-packages/ik_llama_cpp/lib/

Linux only: memory and the start of a process are read from /proc.

Prints a table, and ends with one JSON line; Ctrl-C, or a limit that ends it, leaves what was measured until then.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from full_shape import FULL, commit, make

from kimi_lite.bench import machine
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.kernels import default_threads

PEERS = {  # engine: its module, its name, what installs it
    "llama": ("llama_cpp", "llama.cpp", "llama-cpp-python"),
    "ik": ("ik_llama_cpp", "ik_llama.cpp", "ik-llama-cpp-python"),
}
INSTRUCTIONS = {  # a flag of /proc/cpuinfo: what ggml calls it when it lists those that a build uses
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
}
ROWS = {  # row: what it says, in tokens a second
    "prefill_256": "prefill, 256 tokens",
    "prefill_2048": "prefill, 2048 tokens",
    "decode": "decode after 256 tokens",
    "busy": "the same, one core busy",
    "decode_4096": "decode after 4096 tokens",
    "decode_16384": "decode after 16384 tokens",
    "decode_65536": "decode after 65536 tokens",
}
DEEP = ("decode_16384", "decode_65536")
TURNS = ("decode", "prefill_256", "prefill_2048")  # rows that are worth turns
CPU_INFO = Path("/proc/cpuinfo")
WORKER = Path(__file__).with_name("peer_worker.py")
MEMORY_OF_REPACKING = (
    1.9  # of the file's size: the copy, and the part of the file that is still read from the map
)

Speeds = dict[str, float]  # by row


@dataclass(frozen=True)
class Setting:
    """How a peer is run. `rows` are those that it is tried for; None for all."""

    repack: bool = False
    flash: bool = True
    ubatch: int = 512
    rows: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"repack {'on' if self.repack else 'off'}, flash attention {'on' if self.flash else 'off'}, ubatch {self.ubatch}"


# What is worth trying. A larger ubatch changes nothing below its size. llama.cpp's repacked experts are multiplied one
# token at a time, which makes long prompts slower; at depth, flash attention is what both are quick with.
SHORT = ("prefill_256", "decode", "busy", "decode_4096")
SETTINGS = {
    "ours": (Setting(),),
    "llama": (
        Setting(),
        Setting(repack=True, rows=(*SHORT, *DEEP)),
        Setting(flash=False, rows=("prefill_256",)),
        Setting(ubatch=2048, rows=("prefill_2048",)),
        Setting(flash=False, ubatch=2048, rows=("prefill_2048",)),
    ),
    "ik": (
        Setting(rows=(*SHORT, *DEEP)),
        Setting(repack=True),
        Setting(ubatch=2048, rows=("prefill_2048",)),
        Setting(repack=True, ubatch=2048, rows=("prefill_2048",)),
    ),
}


class Bench:
    """Runs workers and keeps what they measured: `samples[engine][row]`, one value a round, by the row's setting."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.files = {"ours": arguments.packed, "llama": arguments.gguf, "ik": arguments.gguf}
        self.interpreters = {"ours": sys.executable, "llama": arguments.python, "ik": arguments.python}
        self.rows = [row for row in ROWS if row in arguments.rows]
        self.samples: dict[str, dict[tuple[str, Setting], list[float]]] = {}
        self.memory: dict[str, dict[str, float]] = {}
        self.versions: dict[str, str] = {}
        self.unused: dict[str, list[str]] = {}  # by peer: what its build leaves out of this processor
        self.pairs: dict[str, dict[str, Any]] = {}  # by row: the peer, and both speeds of each turn
        self.missing: dict[str, str] = {}  # the package of each peer that is not there

    def run(self) -> None:
        engines = ["ours", *self.present()]
        for number in range(self.arguments.rounds):
            for engine in engines if number % 2 == 0 else engines[::-1]:
                for setting, rows in self.jobs(engine, first=number == 0):
                    self.measure(engine, setting, rows)
                if "first" in self.arguments.rows:
                    self.measure(engine, self.best(engine, "first"), ["first"])
        rows = [row for row in self.rows if row in TURNS and len(engines) > 1 and self.arguments.turns]
        for row in rows:
            medians = self.medians()
            self.take_turns(row, max(engines[1:], key=lambda engine: medians.get(engine, {}).get(row, 0.0)))

    def present(self) -> list[str]:
        """The peers that the interpreter has; the others are said and remembered."""
        here = []
        for engine, (module, _, _) in PEERS.items():
            look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            if subprocess.run([self.arguments.python, "-c", look], check=False).returncode == 0:
                here.append(engine)
            else:
                self.missing[engine] = PEERS[engine][2]
                print(missing_peer(engine, self.arguments.python), file=sys.stderr)
        return here

    def jobs(self, engine: str, first: bool) -> list[tuple[Setting, list[str]]]:
        """What to run in a round: all settings in the first, then only the best of each row."""
        if not first:
            chosen: dict[Setting, list[str]] = {}
            for row in self.rows:
                chosen.setdefault(self.best(engine, row), []).append(row)
            return list(chosen.items())
        jobs = []
        for setting in SETTINGS[engine]:
            if setting.repack and not repacking_fits(
                self.files[engine].stat().st_size, psutil.virtual_memory().total
            ):
                print(
                    f"{engine}: repacking is left out, for a copy of the weights does not fit here",
                    file=sys.stderr,
                )
                continue
            jobs.append((setting, [row for row in self.rows if setting.rows is None or row in setting.rows]))
        return jobs

    def best(self, engine: str, row: str) -> Setting:
        """The setting that was fastest for a row; the plain one for a row that was not measured yet."""
        found = {s: statistics.median(x) for (r, s), x in self.samples.get(engine, {}).items() if r == row}
        return max(found, key=lambda s: found[s], default=SETTINGS[engine][0])

    def measure(self, engine: str, setting: Setting, rows: list[str]) -> None:
        """One process. The deepest rows get one with a context of their own, so that others do not carry its memory."""
        groups = [[row for row in rows if row not in DEEP], *([row] for row in rows if row in DEEP)]
        for group in filter(None, groups):
            bring_in(self.files[engine])
            asked = [*group, "read_fraction"] if engine == "ours" and group != ["first"] else group
            done = subprocess.run(
                self.command(engine, setting, deepest(group), rows=asked),
                capture_output=True,
                text=True,
                check=False,
                env=environment(engine),
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                print(f"{engine}: no result with {setting}: {last}", file=sys.stderr)
                continue
            self.keep(engine, setting, group, json.loads(done.stdout.splitlines()[-1]))

    def command(self, engine: str, setting: Setting, depth: int, **job: Any) -> list[str]:
        """What starts a worker."""
        job |= {
            "engine": engine,
            "file": str(self.files[engine]),
            "threads": self.arguments.threads,
            "context": depth + 64,
            "repack": setting.repack,
            "flash": setting.flash,
            "ubatch": setting.ubatch,
        }
        return [
            *shlex.split(self.arguments.wrap),
            self.interpreters[engine],
            str(WORKER),
            json.dumps(job),
        ]

    def take_turns(self, row: str, peer: str) -> None:
        """A row by two workers that live side by side; who begins changes."""
        workers: dict[str, subprocess.Popen[str]] = {}
        try:
            for engine in ("ours", peer):
                bring_in(self.files[engine])
                workers[engine] = subprocess.Popen(
                    self.command(engine, self.best(engine, row), deepest([row]), turns=True),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment(engine),
                )
                if not said(workers[engine], "ready"):
                    print(f"no turns for {row}: {engine} did not start beside the other", file=sys.stderr)
                    return
            bring_in(self.files["ours"])  # the peer's start may have pushed it out
            pairs, reads = [], []
            for number in range(-1, self.arguments.turns):
                read = ask(workers["ours"], "read")
                order = ("ours", peer) if number % 2 == 0 else (peer, "ours")
                speeds = {engine: ask(workers[engine], row) for engine in order}
                if number >= 0:  # the first pair brings both in
                    pairs.append([round(speeds[engine], 3) for engine in ("ours", peer)])
                    reads.append(round(read, 1))
                    print(f"{row}: {pairs[-1]}, a plain read {reads[-1]} GB/s", file=sys.stderr)
            ratio = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
            self.pairs[row] = {"peer": peer, "ratio": ratio, "pairs": pairs, "read_gb_per_s": reads}
            print(f"{row} by turns: {ratio} times {peer}", file=sys.stderr)
        except (BrokenPipeError, ChildProcessError):
            print(f"no turns for {row}: a worker ended; is there memory for both?", file=sys.stderr)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.communicate()  # ends, and closes its pipes

    def keep(self, engine: str, setting: Setting, rows: list[str], result: dict[str, Any]) -> None:
        samples = self.samples.setdefault(engine, {})
        for row in (*rows, "read_fraction"):
            if row in result:
                samples.setdefault((row, setting), []).append(result[row])
        if "version" in result:
            self.note_version(engine, result["version"])
            excess = result["anonymous_mb"] - deepest(rows) * LatentCache.bytes_per_token(FULL) / 1e6
            peaks = self.memory.setdefault(engine, {})
            for name, value in (
                ("anonymous_mb", result["anonymous_mb"]),
                ("large_pages_mb", result["large_pages_mb"]),
                ("excess_mb", excess),
            ):
                peaks[name] = round(max(peaks.get(name, 0.0), value), 1)
        how = "" if engine == "ours" else f" ({setting})"
        for row in rows:
            print(f"{time.strftime('%H:%M:%S')} {engine} {row}: {result[row]:.2f}{how}", file=sys.stderr)

    def note_version(self, engine: str, version: str) -> None:
        """Remembers it, and says once what the peer's build leaves unused."""
        if engine not in self.versions and engine in PEERS:
            flags = next((x for x in CPU_INFO.read_text().splitlines() if x.startswith("flags")), "").split()
            if unused := unused_instructions(version, flags):
                self.unused[engine] = unused
                print(slow_build(engine, self.arguments.python, unused), file=sys.stderr)
        self.versions[engine] = version

    def medians(self) -> dict[str, Speeds]:
        """Of each row's best setting."""
        return {
            engine: {
                row: round(statistics.median(samples[row, self.best(engine, row)]), 3)
                for row in dict.fromkeys(row for row, _ in samples)
            }
            for engine, samples in self.samples.items()
        }


def ratios(medians: dict[str, Speeds], excess_mb: float | None) -> dict[str, float | None]:
    """What the comparison comes to; None where a peer or a row is missing."""

    def ours_over(row: str, *peers: str) -> float | None:
        theirs = [medians[peer][row] for peer in peers if row in medians.get(peer, {})]
        return round(medians["ours"][row] / max(theirs), 3) if theirs and row in medians["ours"] else None

    def least(*values: float | None) -> float | None:
        return min((value for value in values if value is not None), default=None)

    ours = medians["ours"]
    busy, quiet = ours.get("busy"), ours.get("decode")
    out: dict[str, float | None] = {"decode": ours_over("decode", "llama", "ik")}
    for peer in PEERS:
        lengths = {n: ours_over(f"prefill_{n}", peer) for n in (256, 2048)}
        out[f"prefill_{peer}"] = least(*lengths.values())
        out |= {f"prefill_{peer}_{n}": value for n, value in lengths.items()}
    out["decode_4k"] = ours_over("decode_4096", "llama")
    out["decode_4k_ik"] = ours_over("decode_4096", "ik")
    out["decode_16k"] = ours_over("decode_16384", "llama", "ik")
    out["decode_64k"] = ours_over("decode_65536", "llama", "ik")
    out["read_fraction"] = ours.get("read_fraction")
    out["busy_core"] = round(busy / quiet, 3) if busy and quiet else None
    out["peak_excess_mb"] = excess_mb
    return out


def environment(engine: str) -> dict[str, str]:
    """What a worker sees.

    pip compiles what it installs; a checkout's modules must be allowed to keep their bytecode too. And a peer's copy of the
    weights gets large pages, as our mapped file does: most systems give them to who asks, and glibc asks when told to.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if engine in PEERS else {})


def said(worker: "subprocess.Popen[str]", word: str) -> bool:
    """Waits for a line; libraries print what they like before it."""
    assert worker.stdout is not None
    return any(line.strip() == word for line in iter(worker.stdout.readline, ""))


def ask(worker: "subprocess.Popen[str]", row: str) -> float:
    """A turn: tokens a second. Raises BrokenPipeError or ChildProcessError if the worker has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    time.sleep(0.3)  # until the other's threads have gone to sleep
    print(row, file=worker.stdin, flush=True)
    if not (line := worker.stdout.readline()):
        raise ChildProcessError
    return float(line)


def missing_peer(engine: str, python: str) -> str:
    _, name, package = PEERS[engine]
    return f"{name} is not installed for {python}; to compare with it: {python} -m pip install {package}"


def slow_build(engine: str, python: str, unused: list[str]) -> str:
    return (
        f"{PEERS[engine][1]} for {python} is built without {' and '.join(unused)}, which this processor has, so it is "
        f"slower than it could be; the head of {Path(__file__).name} says how to build it for this machine"
    )


def unused_instructions(version: str, flags: Iterable[str]) -> list[str]:
    """Those of INSTRUCTIONS that the processor has and a ggml build's own list ("AVX2 = 1 | AVX512 = 0 |") does not."""
    used = {
        name.strip()
        for name, _, on in (item.partition("=") for item in re.split("[|:]", version))
        if on.strip() == "1"
    }
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags and name not in used]


def repacking_fits(file_bytes: int, memory_bytes: int) -> bool:
    return MEMORY_OF_REPACKING * file_bytes < memory_bytes


def deepest(rows: Iterable[str]) -> int:
    """Tokens in the cache when the longest of the rows is done."""
    sizes = [int(size) if (size := row.rpartition("_")[2]).isdigit() else 256 for row in rows]
    return max(sizes) + 33


def bring_in(path: Path) -> None:
    """Read a file anew, so that all of it is in memory, in large pages where the system has them: theirs as well as ours."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        GgufFile(path).bring_in().join()
        while file.read(16 << 20):
            pass


def report(medians: dict[str, Speeds], bench: Bench) -> Iterable[str]:
    """The table for people."""
    engines = list(medians)
    yield f"{'':26}" + "".join(f"{PEERS[e][1] if e in PEERS else 'kimi-lite':>14}" for e in engines)
    for row, text in {**ROWS, "first": "first token, seconds"}.items():
        if any(row in medians[e] for e in engines):
            yield f"{text:26}" + "".join(f"{medians[e].get(row, float('nan')):14.2f}" for e in engines)
    own = [bench.memory.get(e, {}).get("anonymous_mb", float("nan")) for e in engines]
    yield f"{'memory of its own, MB':26}" + "".join(f"{value:14.0f}" for value in own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument(
        "--packed", type=Path, default=Path("full-shape-int4.gguf"), help="made if it is not there"
    )
    parser.add_argument(
        "--gguf", type=Path, default=Path("full-shape-q4_k_m.gguf"), help="made if it is not there"
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default=",".join([*(r for r in ROWS if r not in DEEP), "first"]))
    parser.add_argument(
        "--turns",
        type=int,
        default=0,
        help=f"so many turns with the best peer for {', '.join(TURNS)}, as far as --rows has them",
    )
    parser.add_argument("--deep", action="store_true", help="decode at 16,384 and 65,536 tokens too")
    parser.add_argument(
        "--wrap", default="", help="put before each engine's command, such as 'taskset -c 0,1'"
    )
    arguments = parser.parse_args()
    arguments.rows = [*arguments.rows.split(","), *(DEEP if arguments.deep else ())]
    if unknown := set(arguments.rows) - {*ROWS, "first"}:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join([*ROWS, 'first'])}")
    if arguments.turns < 0:
        parser.error(f"--turns is {arguments.turns}; give how many, or 0 for none")
    if shutil.which(arguments.python) is None:
        parser.error(
            f"--python is {arguments.python}, which does not run; name the interpreter that has the peers"
        )
    for kind, path in (("packed", arguments.packed), ("gguf", arguments.gguf)):
        if not path.exists():
            make(kind, path)
    bench = Bench(arguments)
    cut_off = False
    try:
        bench.run()
    except KeyboardInterrupt:
        cut_off = True
        print("cut off; what follows is what was measured until then", file=sys.stderr)
    medians = bench.medians()
    if "ours" not in medians:
        raise SystemExit("kimi-lite gave no result, so there is nothing to compare")
    print("\n".join(report(medians, bench)))
    print(
        json.dumps(
            {
                "bench": "peers",
                "cut_off": cut_off,
                **ratios(medians, bench.memory.get("ours", {}).get("excess_mb")),
                "turns": bench.pairs,
                "medians": medians,
                "memory": bench.memory,
                "settings": {
                    e: {row: str(bench.best(e, row)) for row in medians[e]} for e in medians if e != "ours"
                },
                "samples": {
                    e: {f"{row}, {s}": x for (row, s), x in samples.items()}
                    for e, samples in bench.samples.items()
                },
                "missing": bench.missing,
                "unused_instructions": bench.unused,
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "commit": commit(),
                "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "machine": machine(),
                "versions": bench.versions,
                "files": {name: path.stat().st_size for name, path in bench.files.items()},
            }
        )
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
