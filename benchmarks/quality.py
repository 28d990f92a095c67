"""What do 4 bits cost? KL divergence and top-1 agreement of quantized files against the float32 reference.

    python benchmarks/quality.py [CHECKPOINT] [--n 30] [--json FILE]

Runs held-out text prompts of kimi-vl-nano with their right replies through the reference (weights as stored, products
in float32) and through the CPU runtime, token by token, and compares the two distributions wherever the model has to
say something. Several recipes are quantized into a temporary folder: the default one, and others that move the
tensors every token reads between 4 and 8 bits. bf16 shows what the runtime's own int8 activations and cache cost.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(kimi_lite.__file__).parent / "nano")
    parser.add_argument("--n", type=int, default=30, help="prompts per text task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one JSON line a recipe to this file")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.checkpoint)
    prompts, truth = [], []
    for task, samples in held_out(arguments.seed, arguments.n).items():
        for sample in (s for s in samples if not s.pictures):
            ids, learned = encode_sample(sample, tokenizer, 0)
            with torch.inference_mode():
                logits_TV = model(torch.tensor(ids)[None])[0].numpy()
            prompts.append((task, ids, learned.index(True)))
            truth.append(logits_TV)
    for name, (target, eight_bits) in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            kept, plan.EIGHT_BITS = plan.EIGHT_BITS, eight_bits
            try:
                result = quantize(arguments.checkpoint, Path(folder) / "model.gguf", to=target)  # type: ignore[arg-type]
            finally:
                plan.EIGHT_BITS = kept
            engine = Engine(Path(folder) / "model.gguf")
            divergences, agree = [], []
            for (_, ids, first), logits_TV in zip(prompts, truth, strict=True):
                engine.rewind(0)
                ours_V = engine.append(ids[:first])
                for t in range(first, len(ids)):
                    p, q = log_softmax(logits_TV[t - 1]), log_softmax(ours_V)
                    divergences.append(float((np.exp(p) * (p - q)).sum()))
                    agree.append(int(logits_TV[t - 1].argmax()) == int(ours_V.argmax()))
                    ours_V = engine.append([ids[t]])
            mean = float(np.mean(divergences))
            print(
                f"{name:48} {result.bits_per_weight:5.2f} bits a weight   KL {mean:.5f}   "
                f"99th percentile {np.percentile(divergences, 99):.4f}   top-1 {np.mean(agree):.3%}"
            )
        if arguments.json:
            record = {
                "bench": "quality",
                "model": arguments.checkpoint.name,
                "seed": arguments.seed,
                "prompts": len(prompts),
                "tokens": len(agree),
                "recipe": name,
                "bits_per_weight": round(result.bits_per_weight, 3),
                "kl_mean": round(mean, 6),
                "kl_p99": round(float(np.percentile(divergences, 99)), 5),
                "top1": round(float(np.mean(agree)), 5),
            }
            with arguments.json.open("a") as out:
                out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
