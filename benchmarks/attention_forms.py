"""What do the two forms of attention cost? Absorbed and expanded against the float32 reference, on long prompts.

    python benchmarks/attention_forms.py [CHECKPOINT] [--n 50] [--json FILE]

Each prompt is a held-out text question of kimi-vl-nano behind others with their right replies, so long that the expanded form
would be taken. It is run once in each form, and the distribution of the first token of the reply is compared with the
reference's. The bf16 file shows what the forms themselves round, the int4 file what is left of that beside 4 bits.
"""

import json
import random
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import torch
from full_shape import append_line
from quality import asked_for, log_softmax

from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.model import CpuModel, expands
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.model import load
from kimi_lite.runtime.reference.train import encode_sample
from kimi_lite.runtime.weights import open_weights


def long_prompts(checkpoint: Path, seed: int, n: int) -> list[tuple[list[int], np.ndarray]]:
    """n prompts a text task, each with the reference's logits after it."""
    model, tokenizer = load(checkpoint)
    samples = [s for task in held_out(seed, n).values() for s in task if not s.pictures]
    encoded, rng, out = [encode_sample(s, tokenizer, 0) for s in samples], random.Random(seed), []
    least = next(T for T in count(1) if expands(model.config.text, T))
    for question, learned in encoded:
        ids: list[int] = []
        while len(ids) < least:
            ids += rng.choice(encoded)[0]
        ids += question[: learned.index(True)]
        with torch.inference_mode():
            out.append((ids, model(torch.tensor(ids)[None])[0, -1].numpy()))
    return out


def main() -> None:
    arguments = asked_for(__doc__).parse_args()
    asked = long_prompts(arguments.checkpoint, arguments.seed, arguments.n)
    for target in ("bf16", "int4"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            quantize(arguments.checkpoint, path, to=target)
            weights, longest = open_weights(path), max(len(ids) for ids, _ in asked)
            for form in ("absorbed", "expanded"):
                divergences, agree = [], []
                for ids, logits_V in asked:
                    model = CpuModel(weights, longest, expanded=form == "expanded")
                    p_V, q_V = log_softmax(logits_V), log_softmax(model.forward(np.array(ids, np.int32)))
                    divergences.append(float((np.exp(p_V) * (p_V - q_V)).sum()))
                    agree.append(int(p_V.argmax()) == int(q_V.argmax()))
                record = {
                    "bench": "attention_forms",
                    "model": arguments.checkpoint.name,
                    "seed": arguments.seed,
                    "prompts": len(asked),
                    "mean_length": round(float(np.mean([len(ids) for ids, _ in asked])), 1),
                    "file": target,
                    "form": form,
                    "kl_mean": float(f"{np.mean(divergences):.3g}"),
                    "kl_p99": float(f"{np.percentile(divergences, 99):.3g}"),
                    "kl_median": float(f"{np.median(divergences):.3g}"),
                    "top1": round(float(np.mean(agree)), 5),
                }
                print(json.dumps(record))
                if arguments.json:
                    append_line(arguments.json, record)


if __name__ == "__main__":
    main()
