"""How well does kimi-vl-nano do what it was taught? Prints a table over held-out prompts.

    python -m kimi_lite.runtime.reference.evaluate [DIR] [--seed 7] [--n 200] [--json FILE]

Payloads come from the tenth that training never draws; the seed chooses among them and everything else (wording,
fonts, colours, sizes, places). An answer counts only if what follows the thinking equals the expected text exactly.
Runs the reference on the stored bf16 weights, with bf16 products where the processor has them and float32 ones elsewhere.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import kimi_lite
from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.tasks import TEXT_TASKS, Draw, Sample, reading, shapes, two_pictures
from kimi_lite.runtime.reference.train import BF16_HERE, collate, encode_sample
from kimi_lite.runtime.tokenizer import Tokenizer

CLOSE = "◁/think▷"
MAX_TOKENS = 96
BATCH = 64


def held_out(seed: int, n: int) -> dict[str, list[Sample]]:
    """n prompts per task that training never saw."""
    tasks: dict[str, list[Sample]] = {}
    for number, (name, (make, _)) in enumerate(TEXT_TASKS.items()):
        draw = Draw(np.random.default_rng((seed, 10, number)), held_out=True)
        tasks[name] = [Sample(name, (make(draw),)) for _ in range(n)]
    draw = Draw(np.random.default_rng((seed, 11)), held_out=True)
    tasks["read"] = [
        reading(draw, (int(draw.rng.integers(1, 4)), int(draw.rng.integers(3, 8)))) for _ in range(n)
    ]
    draw = Draw(np.random.default_rng((seed, 12)), held_out=True)
    for _ in range(3 * n):
        sample = shapes(draw, (int(draw.rng.integers(2, 5)), int(draw.rng.integers(2, 5))))
        tasks.setdefault(sample.task, []).append(sample)
    draw = Draw(np.random.default_rng((seed, 13)), held_out=True)
    for _ in range(2 * n):
        sample = two_pictures(draw, (int(draw.rng.integers(2, 4)), int(draw.rng.integers(3, 6))))
        tasks.setdefault(sample.task, []).append(sample)
    return tasks


def answers(model: KimiVL, tokenizer: Tokenizer, samples: list[Sample]) -> list[str]:
    """Greedy replies, in order. Prompts of one length and one grid run together."""
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        batch = collate([sample], tokenizer, 0)
        _, learned = encode_sample(sample, tokenizer, batch.grid[0] * batch.grid[1] // 4 if batch.grid else 0)
        groups[(learned.index(True), *(batch.grid or (0, 0)))].append(i)
    replies = [""] * len(samples)
    for (n_prompt, *_), members in groups.items():
        for at in range(0, len(members), BATCH):
            chunk = members[at : at + BATCH]
            batch = collate([samples[i] for i in chunk], tokenizer, 0)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=BF16_HERE):
                rows = None
                if batch.patches_NPX is not None and batch.grid is not None:
                    rows = model.encode_images(torch.from_numpy(batch.patches_NPX), batch.grid)
                prompt = torch.from_numpy(batch.ids_BT[:, :n_prompt])
                out = model.generate(prompt, tokenizer.stop_ids, MAX_TOKENS, rows)
            for i, ids in zip(chunk, out, strict=True):
                replies[i] = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    return replies


def exact(replies: Iterable[str], samples: Iterable[Sample]) -> list[bool]:
    return [
        r.partition(CLOSE)[2].strip() == s.turns[-1].answer for r, s in zip(replies, samples, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=Path(kimi_lite.__file__).parent / "nano")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--n", type=int, default=200, help="prompts per task")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per task")
    parser.add_argument("--json", type=Path, help="also append one JSON line to this file")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    record: dict[str, object] = {
        "bench": "nano-evaluate",
        "seed": arguments.seed,
        "n": arguments.n,
        "products": "bf16" if BF16_HERE else "float32",
        "exact": {},
    }
    results: dict[str, float] = {}
    print(f"{'task':<16}{'prompts':>8}{'exact':>9}{'seconds':>9}")
    for task, samples in held_out(arguments.seed, arguments.n).items():
        start = time.monotonic()
        replies = answers(model, tokenizer, samples)
        right = exact(replies, samples)
        results[task] = sum(right) / len(right)
        print(f"{task:<16}{len(right):>8}{results[task]:>9.1%}{time.monotonic() - start:>9.1f}", flush=True)
        wrong = [i for i, ok in enumerate(right) if not ok]
        for i in wrong[: arguments.show]:
            print(
                f"    {samples[i].turns[-1].question!r} expected {samples[i].turns[-1].answer!r}, got {replies[i]!r}"
            )
    if arguments.json:
        with arguments.json.open("a") as out:
            out.write(json.dumps(record | {"exact": {k: round(v, 4) for k, v in results.items()}}) + "\n")


if __name__ == "__main__":
    main()
