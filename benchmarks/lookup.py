"""What does guessing by prompt lookup give, and what does it cost where nothing repeats?

    python benchmarks/lookup.py [FILE] [--turns 5] [--threads N] [--prompt 1024] [--json RESULTS]

The answer is a script: a grammar allows one token at a time. It takes runs of tokens from the prompt, and between them stand
fresh ones that no match foretells; the rows differ in how long the runs are. Everything else is real: the model runs, logits
are drawn from, guesses are made, checked and dropped. With random weights and random tokens the experts of neighbours
have nothing to do with each other, which is the dearest case. Turns with and without guessing follow each other.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from full_shape import append_line, commit, make
from numpy.typing import NDArray

from kimi_lite.bench import machine, warm_up
from kimi_lite.runtime import kernels
from kimi_lite.runtime.constraint import Constraint
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.sampling import SamplingOptions

ANSWER = 96  # tokens
KINDS = {  # fresh tokens, then so many of the prompt, and so on
    "nothing is copied": (1, 0),
    "runs of 8, 8 fresh between": (8, 8),
    "runs of 16, 4 fresh between": (4, 16),
    "runs of 44, 4 fresh between": (4, 44),
    "all is copied": (0, 96),
}


class Script:
    """A constraint that allows the next token of a list, and nothing else."""

    complete = False

    def __init__(self, ids: Sequence[int], n_vocab: int) -> None:
        self._ids, self._at, self._allowed_V = ids, 0, np.zeros(n_vocab, np.bool_)

    def allowed(self) -> NDArray[np.bool_]:
        self._allowed_V[:] = False
        self._allowed_V[self._ids[self._at]] = True
        return self._allowed_V

    def accept(self, token: int) -> None:
        assert token == self._ids[self._at]
        self._at += 1


def answer(prompt: Sequence[int], fresh: int, run: int, draw: random.Random, n_plain: int) -> list[int]:
    out: list[int] = []
    while len(out) < ANSWER:
        out += [draw.randrange(n_plain) for _ in range(fresh)]
        start = draw.randrange(len(prompt) - run)
        out += prompt[start : start + run]
    return out[:ANSWER]


def speed(engine: Engine, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Tokens a second after the first."""
    script = cast(Constraint, Script(ids, engine.config.vocab_size))
    stream = engine.generate(prompt, SamplingOptions(), max_tokens=len(ids), constraint=script)
    next(stream)
    start = time.perf_counter()
    assert len(list(stream)) == len(ids) - 1
    return (len(ids) - 1) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", default=Path("full-shape-int4.gguf"), help="made if it is not there"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    a = parser.parse_args()
    if not a.file.exists():
        make("packed", a.file)
    engine = Engine(a.file, threads=a.threads)
    engine.stop_ids = frozenset()  # a script ends where it ends
    warm_up(engine)
    n_plain = len(engine.vocab.ranks)
    draw = random.Random(1)
    prompt = [draw.randrange(n_plain) for _ in range(a.prompt)]
    rows: dict[str, dict[str, Any]] = {}
    for kind, (fresh, run) in KINDS.items():
        ratios, with_s, without_s = [], [], []
        guessed = right = 0
        for turn in range(a.turns):
            ids = answer(prompt, fresh, run, draw, n_plain)
            speeds = {}
            for guessing in (True, False) if turn % 2 else (False, True):
                engine.guessing = guessing
                speeds[guessing] = speed(engine, prompt, ids)
                if guessing:
                    guessed, right = guessed + engine.n_guessed, right + engine.n_right
            with_s.append(speeds[True])
            without_s.append(speeds[False])
            ratios.append(speeds[True] / speeds[False])
        rows[kind] = {
            "with": round(statistics.median(with_s), 2),
            "without": round(statistics.median(without_s), 2),
            "ratio": round(statistics.median(ratios), 3),
            "guessed": guessed,
            "right": right,
        }
        print(f"{kind:<28} {rows[kind]}", flush=True)
    if a.json:
        record = {
            "bench": "lookup",
            "prompt": a.prompt,
            "answer": ANSWER,
            "turns": a.turns,
            "threads": kernels.threads(),
            "rows": rows,
            "isa": kernels.isa(),
            "commit": commit(),
            **machine(),
        }
        append_line(a.json, record)


if __name__ == "__main__":
    main()
