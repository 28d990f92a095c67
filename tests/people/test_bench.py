"""`kimi-lite bench` on the small model, and the arithmetic of benchmarks/peers.py. No speed is asserted."""

import json
import math
import os
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import peers
import pytest
from peer_worker import repeat_state
from peers import (
    PEERS,
    Bench,
    Setting,
    deepest,
    environment,
    missing_peer,
    ratios,
    repacking_fits,
    unused_instructions,
)

from kimi_lite.api import nano_path
from kimi_lite.bench import fill_cache, large_pages
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.model import CpuModel

FAST = ("--prompt", "5,40", "--depth", "0,70", "--decode", "3")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_lite", "bench", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KIMI_LITE_ISA": ""},
        timeout=120,
    )


def test_the_json_says_what_was_measured_and_where() -> None:
    done = bench(*FAST, "--threads", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "kimi-lite-bench/1"
    assert {"cpu", "cores", "memory_gb", "system"} <= report["machine"].keys()
    assert {"kimi-lite", "python", "numpy"} <= report["versions"].keys()
    assert report["isa"]
    rows = report["rows"]
    expected = [("prefill", 0, 5), ("prefill", 0, 40), ("decode", 0, 3), ("decode", 70, 3)]
    assert [(r["threads"], r["kind"], r["depth"], r["n"]) for r in rows] == [
        (threads, *row) for threads in (1, 2) for row in expected
    ]
    for row in rows:
        assert row["p10"] <= row["tok_per_s"] <= row["p90"]
        assert row["memory"]["anonymous"] > 0
        assert row["memory"]["mapped"] > 0
        if row["kind"] == "decode":
            moved = report["weight_bytes_per_token"] + (row["depth"] + 1) * report["cache_bytes_per_token"]
            assert row["bytes_per_token"] == moved
            assert row["gb_per_s"] == pytest.approx(moved * row["tok_per_s"] / 1e9, abs=0.01)
            assert row["read_gb_per_s"] > 0
        else:
            assert row["bytes_per_token"] is None


def test_the_table_has_a_line_for_each_row() -> None:
    done = bench(str(nano_path()), *FAST, "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for word in ("tok/s", "GB a token", "share", "own memory", "mapped file"):
        assert any(word in line for line in lines)
    assert [line.split()[1] for line in lines if line[:7].strip() == "1"] == ["prefill"] * 2 + ["decode"] * 2
    assert done.stderr == ""  # a model was named, and nobody watches


def test_the_share_in_large_pages_is_that_of_the_models_own_maps(tmp_path: Path) -> None:
    model, maps = tmp_path / "model.gguf", tmp_path / "smaps"
    assert large_pages(model, maps) is None  # not Linux

    def mapped(what: object, rss: int, large: int) -> str:
        head = f"7f58fce00000-7f5b21a18000 r--s 00000000 fe:00 2146368   {what}\n"
        return head + f"Size: 9999 kB\nRss:   {rss} kB\nFilePmdMapped:  {large} kB\nVmFlags: rd mr me ms hg\n"

    maps.write_text(mapped("/lib/x.so", 500, 500) + mapped(model, 6000, 4096) + mapped("[heap]", 7, 0))
    assert large_pages(model, maps) == 0.683
    maps.write_text(mapped("/lib/x.so", 500, 500))
    assert large_pages(model, maps) is None
    maps.write_text(mapped(model, 3000, 2048) + mapped(model, 1000, 0))
    assert large_pages(model, maps) == 0.512


def test_without_sizes_the_small_models_context_is_enough() -> None:
    done = bench("--decode", "1", "--threads", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert [(r["kind"], r["n"], r["depth"]) for r in json.loads(done.stdout)["rows"]] == [
        ("prefill", 256, 0),
        ("prefill", 2048, 0),
        ("decode", 1, 0),
        ("decode", 1, 4096),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--prompt", "256,x"), 2, "--prompt is '256,x'"),
        (("--prompt", "0"), 2, "--prompt is '0'"),
        (("--depth", "-1"), 2, "--depth is '-1'"),
        (("--threads", "0"), 2, "--threads is '0'"),
        (("--threads", "1,9999"), 2, "9999 threads were asked for"),
        (("--decode", "-1"), 2, "at least 0"),
        (("--depth", "9000"), 2, "needs a context of 9032 tokens"),
        (("--prompt", "2048", "--context", "300"), 2, "but there are 300"),
        (("--context", "99999"), 2, "a context of 99999 tokens"),
        (("nowhere.gguf",), 3, "nowhere.gguf"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], code: int, says: str) -> None:
    done = bench(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_made_up_cache_is_as_deep_as_asked_and_runs() -> None:
    engine = Engine(nano_path(), context=400)
    fill_cache(engine, 300)
    assert isinstance(engine.model, CpuModel)
    assert (engine.model.cache.n, len(engine.tokens), len(engine.seen)) == (300, 300, 300)
    deep = engine.append([1, 2, 3])
    assert np.isfinite(deep).all()
    fill_cache(engine, 0)
    assert engine.model.cache.n == 0
    assert not np.array_equal(engine.append([1, 2, 3]), deep)  # the made-up rows were read


# benchmarks/peers.py

MEDIANS = {
    "ours": {
        "prefill_256": 100.0,
        "prefill_2048": 90.0,
        "decode": 20.0,
        "decode_4096": 12.0,
        "busy": 9.0,
        "read_fraction": 0.85,
    },
    "llama": {"prefill_256": 40.0, "prefill_2048": 30.0, "decode": 12.5, "decode_4096": 6.0},
    "ik": {"prefill_256": 50.0, "prefill_2048": 60.0, "decode": 16.0, "decode_4096": 10.0},
}


def test_ratios_are_ours_over_theirs() -> None:
    found = ratios(MEDIANS, 120.0)
    assert found["decode"] == 1.25  # over the better of the two
    assert found["prefill_llama_256"] == 2.5
    assert found["prefill_llama_2048"] == 3.0
    assert found["prefill_llama"] == 2.5  # the smaller
    assert found["prefill_ik"] == 1.5
    assert found["decode_4k"] == 2.0  # over llama.cpp
    assert found["decode_4k_ik"] == 1.2
    assert found["decode_16k"] is None
    assert found["read_fraction"] == 0.85
    assert found["busy_core"] == 0.45
    assert found["peak_excess_mb"] == 120.0


def test_ratios_do_without_a_peer() -> None:
    found = ratios({"ours": MEDIANS["ours"], "ik": MEDIANS["ik"]}, 0.0)
    assert found["decode"] == 1.25
    assert found["prefill_llama"] is None
    assert found["decode_4k"] is None
    alone = ratios({"ours": {"decode": 20.0}}, 0.0)
    assert alone["decode"] is alone["busy_core"] is alone["read_fraction"] is None


@pytest.mark.parametrize("engine", PEERS)
def test_a_missing_peer_is_named_with_what_installs_it(engine: str) -> None:
    _, name, package = PEERS[engine]
    message = missing_peer(engine, "/opt/python")
    assert message.startswith(f"{name} is not installed")
    assert message.endswith(f"/opt/python -m pip install {package}")


IK_READY = "ik-llama-cpp-python 0.1.5: AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = 0 | AVX512_VBMI = 0 | AVX512_VNNI = 0 | "
IK_BUILT = "ik-llama-cpp-python 0.1.5: AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = 1 | AVX512_VBMI = 1 | AVX512_VNNI = 1 | "
LLAMA_BUILT = (
    "llama-cpp-python 0.3.36: CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | REPACK = 1 | "
)
LLAMA_PLAIN = "llama-cpp-python 0.3.36: CPU : SSE3 = 1 | OPENMP = 1 | "
ZEN4, ZEN3 = ["sse3", "avx2", "avx512f", "avx512_vnni"], ["sse3", "avx2"]


@pytest.mark.parametrize(
    ("version", "flags", "unused"),
    [
        (IK_READY, ZEN4, ["AVX512", "AVX512_VNNI"]),
        (IK_READY, ZEN3, []),
        (IK_BUILT, ZEN4, []),
        (LLAMA_BUILT, ZEN4, []),
        (LLAMA_PLAIN, ZEN3, ["AVX2"]),
        ("llama-cpp-python 0.3.36: CPU : AVX2 = 1 | ", ZEN3, []),  # the list's first has a head before it
    ],
)
def test_a_peer_built_for_less_than_this_processor_is_found(
    version: str, flags: list[str], unused: list[str]
) -> None:
    assert unused_instructions(version, flags) == unused


def test_a_peer_built_for_less_is_said_once_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n")
    monkeypatch.setattr(peers, "CPU_INFO", info)
    bench = Bench(Namespace(packed=None, gguf=None, python="/opt/python", rows=[]))
    for _ in range(2):
        bench.note_version("ik", IK_READY)
        bench.note_version("llama", LLAMA_BUILT)
        bench.note_version("ours", "kimi-lite 0.1.0, zen4")
    said = capsys.readouterr().err
    assert said.count("built without AVX512 and AVX512_VNNI, which this processor has") == 1
    assert said.count("\n") == 1
    assert bench.unused == {"ik": ["AVX512", "AVX512_VNNI"]}
    assert bench.versions["llama"] == LLAMA_BUILT


def test_a_peer_is_told_to_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it gets them is the system's to say: each result has how many (`large_pages_mb`)."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert environment("ik")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "GLIBC_TUNABLES" not in environment("ours")
    assert "PYTHONDONTWRITEBYTECODE" not in environment("ours")


def test_a_copy_of_the_weights_must_fit() -> None:
    assert repacking_fits(10_500_000_000, 24 << 30)
    assert not repacking_fits(10_500_000_000, 16 << 30)


def test_the_context_holds_the_longest_row() -> None:
    assert deepest(["decode", "busy"]) == 256 + 33
    assert deepest(["prefill_2048", "decode_4096", "decode"]) == 4096 + 33
    assert str(Setting(repack=True)) == "repack on, flash attention on, ubatch 512"


@pytest.mark.parametrize(("head", "cell", "target"), [(0, 2, 5), (3, 3, 4), (3, 3, 2)])
def test_a_saved_state_is_repeated_row_by_row(head: int, cell: int, target: int) -> None:
    def saved(n: int, rows: list[bytes]) -> bytes:
        cells = b"".join(struct.pack("<i", i) + b"\x07" * 4 * (cell - 1) for i in range(n))
        layers = b"".join(struct.pack("<iq", 1, 4) + b"".join(rows) for _ in range(2))
        return b"\x09" * 4 * head + struct.pack("<i", n) + cells + struct.pack("<ii", 0, 2) + layers + b"tail"

    rows = [b"aaaa", b"bbbb"]
    repeated = (rows * math.ceil(target / 2))[:target]
    assert repeat_state(saved(2, rows), 2, target, head, cell) == saved(target, repeated)


def test_the_cache_of_a_token_is_counted_as_the_engine_counts_it() -> None:
    config = Engine(nano_path(), context=8).weights.config
    # Rows: 128 + 32 channels are 5 groups of 32 int8 values and a float16 scale; columns: 128 channels of the same.
    assert (config.kv_rank, config.rope_dim, config.n_layers) == (128, 32, 4)
    assert LatentCache.bytes_per_token(config) == 4 * (5 * 34 + 128 * 34 // 32)


@pytest.mark.parametrize(
    ("turns_of_the_peer", "says"), [(9, "2.0 times ik"), (2, "a worker ended"), (0, "ik did not start")]
)
def test_turns_are_pairs_and_a_worker_that_ends_costs_no_more_than_them(
    turns_of_the_peer: int, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = Namespace(
        packed=nano_path(), gguf=nano_path(), python=sys.executable, rows=["decode"], turns=3
    )
    run = Bench(arguments)

    def command(
        engine: str, *_: object, **__: object
    ) -> list[str]:  # twice as fast as the peer, which may end
        turns, speed = (9, 2.0) if engine == "ours" else (turns_of_the_peer, 1.0)
        talk = f"print('noise')\nif {turns}: print('ready', flush=True)\nfor _ in range({turns}): print(30.0 if input() == 'read' else {speed}, flush=True)\nif {turns}: input()"
        return [sys.executable, "-c", talk]

    monkeypatch.setattr(run, "command", command)
    run.take_turns("decode", "ik")
    assert says in capfd.readouterr().err
    pairs = {"peer": "ik", "ratio": 2.0, "pairs": [[2.0, 1.0]] * 3, "read_gb_per_s": [30.0] * 3}
    assert run.pairs == ({"decode": pairs} if turns_of_the_peer == 9 else {})
