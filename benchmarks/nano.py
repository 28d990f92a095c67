"""How well does the packed kimi-vl-nano do what it was taught, pictures included, through the runtime people use?

    python benchmarks/nano.py [FILE] [--seed 7] [--n 200] [--json RESULTS]

Asks the prompts of `python -m kimi_lite.runtime.reference.evaluate` (held out from training, same seed), greedily; an
answer counts only if it equals the expected text exactly. Pictures go through the image processor and the int8 tower.
The range is one standard deviation of a share measured on so many prompts.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ["KIMI_LITE_IMAGE_CACHE"] = "off"

from full_shape import append_line

import kimi_lite
from kimi_lite.runtime.reference.evaluate import MAX_TOKENS, held_out
from kimi_lite.runtime.reference.tasks import Sample
from kimi_lite.runtime.template import Message


def reply(model: kimi_lite.Model, sample: Sample) -> str:
    """The answer to the last question of a sample, with the right answers to those before it."""
    model.clear()
    for turn in sample.turns[:-1]:
        question = Message("user", [*model.encode(turn.pictures), turn.question])
        model.conversation.messages += [question, Message("assistant", turn.answer)]
    last = sample.turns[-1]
    events = model.chat(last.question, images=last.pictures, max_tokens=MAX_TOKENS)
    return "".join(event.text for event in events if event.kind == "answer").strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", help="a packed or GGUF file; by default the shipped one"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--n", type=int, default=200, help="prompts a task")
    parser.add_argument("--json", type=Path, help="also append the JSON line to this file")
    arguments = parser.parse_args()
    model = kimi_lite.load(arguments.file)
    shares: dict[str, float] = {}
    print(f"{'task':<16}{'prompts':>8}{'exact':>9}{'±':>7}{'seconds':>9}")
    for task, samples in held_out(arguments.seed, arguments.n).items():
        start, right = time.monotonic(), 0
        for sample in samples:
            right += reply(model, sample) == sample.turns[-1].answer
        share = shares[task] = right / len(samples)
        spread = (share * (1 - share) / len(samples)) ** 0.5
        print(
            f"{task:<16}{len(samples):>8}{share:>9.1%}{spread:>7.1%}{time.monotonic() - start:>9.1f}",
            flush=True,
        )
    record = {
        "bench": "nano-int4",
        "seed": arguments.seed,
        "n": arguments.n,
        "exact": {task: round(share, 4) for task, share in shares.items()},
    }
    print(json.dumps(record))
    if arguments.json:
        append_line(arguments.json, record)


if __name__ == "__main__":
    main()
