"""What do 4 bits cost? KL divergence and top-1 agreement of quantized files against the float32 reference.

    python benchmarks/quality.py [CHECKPOINT] [--n 30] [--json FILE]

Runs held-out text prompts of kimi-vl-nano with their right replies through the reference (weights as stored, products
in float32) and through the CPU runtime, token by token, and compares the two distributions wherever the model has to
say something. Several recipes are quantized into a temporary folder: the default one, and others that move the
tensors every token reads between 4 and 8 bits. bf16 shows what the runtime's own int8 activations and cache cost.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from full_shape import append_line

import kimi_lite
from kimi_lite.quantize import plan
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.model import load
from kimi_lite.runtime.reference.train import encode_sample

ATTENTION = ("attn_kv_a_mqa", "attn_k_b", "attn_v_b")
# name: target, tensors kept at 8 bits
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("bf16", ()),
    "q8_0": ("q8_0", ()),
    "q4_0": ("q4_0", ()),
    "int4, attention, embedding and head in 8 bits": ("int4", (*ATTENTION, "token_embd", "output.weight")),
    "int4, attention and embedding in 8 bits": ("int4", (*ATTENTION, "token_embd")),
    "int4, embedding in 8 bits": ("int4", ("token_embd",)),
    "int4 throughout": ("int4", ()),
}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


@dataclass(frozen=True)
class Question:
    """A held-out prompt with its right reply, and what the reference says after each of their tokens."""

    ids: list[int]
    first: int  # where the reply begins
    logits_TV: np.ndarray


def questions(checkpoint: Path, seed: int, n: int) -> list[Question]:
    """n held-out text prompts a task."""
    model, tokenizer = load(checkpoint)
    out = []
    for samples in held_out(seed, n).values():
        for sample in (s for s in samples if not s.pictures):
            ids, learned = encode_sample(sample, tokenizer, 0)
            with torch.inference_mode():
                logits_TV = model(torch.tensor(ids)[None])[0].numpy()
            out.append(Question(ids, learned.index(True), logits_TV))
    return out


def compared(
    asked: Sequence[Question], append: Callable[[list[int]], np.ndarray], rewind: Callable[[], None]
) -> dict[str, float]:
    """KL divergence of a model's answers from the reference's, token by token, and how often both say the same."""
    divergences, agree = [], []
    for q in asked:
        rewind()
        ours_V = append(q.ids[: q.first])
        for t in range(q.first, len(q.ids)):
            p_V, q_V = log_softmax(q.logits_TV[t - 1]), log_softmax(ours_V)
            divergences.append(float((np.exp(p_V) * (p_V - q_V)).sum()))
            agree.append(int(q.logits_TV[t - 1].argmax()) == int(ours_V.argmax()))
            ours_V = append([q.ids[t]])
    return {
        "tokens": len(agree),
        "kl_mean": round(float(np.mean(divergences)), 6),
        "kl_p99": round(float(np.percentile(divergences, 99)), 5),
        "top1": round(float(np.mean(agree)), 5),
    }


def asked_for(description: str | None) -> argparse.Namespace:
    """The command line that measurements of quality share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(kimi_lite.__file__).parent / "nano")
    parser.add_argument("--n", type=int, default=30, help="prompts per text task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one JSON line a recipe to this file")
    return parser.parse_args()


def main() -> None:
    arguments = asked_for(__doc__)
    asked = questions(arguments.checkpoint, arguments.seed, arguments.n)
    for name, (target, eight_bits) in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            kept, plan.EIGHT_BITS = plan.EIGHT_BITS, eight_bits
            try:
                result = quantize(arguments.checkpoint, Path(folder) / "model.gguf", to=target)  # type: ignore[arg-type]
            finally:
                plan.EIGHT_BITS = kept
            engine = Engine(Path(folder) / "model.gguf")
            found = compared(asked, engine.append, partial(engine.rewind, 0))
        record = {
            "bench": "quality",
            "model": arguments.checkpoint.name,
            "seed": arguments.seed,
            "prompts": len(asked),
            "tokens": found.pop("tokens"),
            "recipe": name,
            "bits_per_weight": round(result.bits_per_weight, 3),
            **found,
        }
        print(
            f"{name:48} {result.bits_per_weight:5.2f} bits a weight   KL {found['kl_mean']:.5f}   "
            f"99th percentile {found['kl_p99']:.4f}   top-1 {found['top1']:.3%}"
        )
        if arguments.json:
            append_line(arguments.json, record)


if __name__ == "__main__":
    main()
