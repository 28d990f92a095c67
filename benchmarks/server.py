"""What does it cost to ask through `kimi-lite serve` rather than from Python?

    python benchmarks/server.py [FILE] [--tokens 64] [--turns 8] [--json RESULTS]

A server and this process hold the same file, which lies in memory once, and take turns of the same answer to the same question, streamed:
seconds from asking to the end, of which each pair gives a ratio. The prompt is known from the turn before, so it is
decoding that counts. Answers are as long as asked, because what would end them is forbidden; with random weights they mean nothing.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from full_shape import append_line, commit, make

import kimi_lite
from kimi_lite.bench import machine
from kimi_lite.runtime import kernels
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message

QUESTION = "What is the difference between the two?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", default=Path("full-shape-int4.gguf"), help="made if it is not there"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    a = parser.parse_args()
    if not a.file.exists():
        make("packed", a.file)
    command = [sys.executable, "-m", "kimi_lite", "serve", str(a.file), "--port", "0", "--vram", "0", "-q"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = server.stderr.readline().partition("http://")[2].partition("/")[0]
        model = kimi_lite.load(a.file, vram=0)
        bias = dict.fromkeys(model.engine.stop_ids, -1e9)
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": a.tokens,
                "logit_bias": {str(token): value for token, value in bias.items()},
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

        def through_http() -> float:
            started = time.perf_counter()
            connection = http.client.HTTPConnection(address)
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            said = connection.getresponse().read().decode()
            took = time.perf_counter() - started
            assert f'"completion_tokens":{a.tokens}' in said, said[-300:]
            return took

        def from_python() -> float:
            started = time.perf_counter()
            options = SamplingOptions(logit_bias=bias)
            *_, done = model.reply([Message("user", QUESTION)], options=options, max_tokens=a.tokens)
            assert done.stats is not None
            assert done.stats.tokens == a.tokens
            return time.perf_counter() - started

        through_http(), from_python()
        pairs = [(through_http(), from_python()) for _ in range(a.turns)]
    finally:
        server.terminate()
    ratios = sorted(http / python for http, python in pairs)
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{a.tokens} tokens through HTTP {ours:.3f} s, from Python {theirs:.3f} s")
    print(f"by pairs {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    if a.json:
        record = {
            "bench": "server",
            "file": a.file.stat().st_size,
            "tokens": a.tokens,
            "seconds": [[round(second, 4) for second in pair] for pair in pairs],
            "ratio": round(statistics.median(ratios), 4),
            "threads": kernels.threads(),
            "isa": kernels.isa(),
            "commit": commit(),
            **machine(),
        }
        append_line(a.json, record)


if __name__ == "__main__":
    main()
