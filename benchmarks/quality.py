"""What do few bits cost? KL divergence and top-1 agreement of quantized files against the float32 reference.

    python benchmarks/quality.py [CHECKPOINT] [--n 30] [--recipes REGEX] [--llama PYTHON] [--json FILE]

Runs held-out prompts of kimi-vl-nano, text and pictures, with their right replies through the reference (weights as
stored, products in float32) and through the CPU runtime, token by token, and compares the two distributions wherever the
model has to say something. Several recipes are quantized into a temporary folder: the default ones, rounded to the nearest
and calibrated, and others that move the tensors every token reads between 4 and 8 bits. bf16 shows what the runtime's own
int8 activations and cache cost. A sample of "its own kind" is prompts and pictures that the model was trained on, one of
"other text" is this project's README and docs, which it was not.

With --llama, an interpreter that has llama-cpp-python, llama.cpp's own mixes are made of the bf16 file and run here too.
"""

import argparse
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from full_shape import append_line

import kimi_lite
from kimi_lite.errors import KimiLiteWarning
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.quantize import plan
from kimi_lite.quantize.calibrate import Passage
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.tasks import TEXT_TASKS, Draw, Sample, reading, shapes, two_pictures
from kimi_lite.runtime.reference.train import collate, encode_sample
from kimi_lite.runtime.tokenizer import Tokenizer
from kimi_lite.runtime.vision import EncodedImage, Place
from kimi_lite.sample import passages

ROOT = Path(__file__).parents[1]
ATTENTION = ("attn_kv_a_mqa", "attn_k_b", "attn_v_b")
# name: target, tensors kept at 8 bits, the sample that it is calibrated with
RECIPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "bf16": ("bf16", (), ""),
    "q8_0": ("q8_0", (), ""),
    "q4_0": ("q4_0", (), ""),
    "int4, attention, embedding and head in 8 bits": (
        "int4",
        (*ATTENTION, "token_embd", "output.weight"),
        "",
    ),
    "int4, attention and embedding in 8 bits": ("int4", (*ATTENTION, "token_embd"), ""),
    "int4, embedding in 8 bits": ("int4", ("token_embd",), ""),
    "int4 throughout": ("int4", (), ""),
    "int4 for other text": ("int4", plan.EIGHT_BITS, "other"),
    "int4 for its own kind": ("int4", plan.EIGHT_BITS, "own"),
    "int3": ("int3", plan.EIGHT_BITS, ""),
    "int3 for other text": ("int3", plan.EIGHT_BITS, "other"),
    "int3 for its own kind": ("int3", plan.EIGHT_BITS, "own"),
}
LLAMA = ("Q4_0", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp
source, folder, *names = sys.argv[1:]
for name in names:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
    out = f"{folder}/{name}.gguf".encode()
    assert llama_cpp.llama_model_quantize(source.encode(), out, ctypes.byref(settings)) == 0, name
"""


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


@dataclass(frozen=True)
class Question:
    """A held-out prompt with its right reply, and what the reference says after each of their tokens."""

    ids: list[int]
    first: int  # where the reply begins
    logits_TV: np.ndarray
    rows_MD: np.ndarray | None = None  # of the pictures, for its image tokens


def encoded(model: KimiVL, tokenizer: Tokenizer, sample: Sample) -> tuple[list[int], int, np.ndarray | None]:
    """Ids, where the reply begins, and the rows of the pictures."""
    if not sample.pictures:
        ids, learned = encode_sample(sample, tokenizer, 0)
        return ids, learned.index(True), None
    batch = collate([sample], tokenizer, 0)
    assert batch.grid is not None
    assert batch.patches_NPX is not None
    ids, learned = encode_sample(sample, tokenizer, batch.grid[0] * batch.grid[1] // 4)
    with torch.inference_mode():
        rows = model.encode_images(torch.from_numpy(batch.patches_NPX), batch.grid)
    return ids, learned.index(True), rows.flatten(0, 1).numpy()


def questions(checkpoint: Path, seed: int, n: int, *, pictures: bool = False) -> list[Question]:
    """n held-out prompts a task: those of text, or those about pictures."""
    model, tokenizer = load(checkpoint)
    out = []
    for samples in held_out(seed, n).values():
        for sample in (s for s in samples if bool(s.pictures) == pictures):
            ids, first, rows_MD = encoded(model, tokenizer, sample)
            with torch.inference_mode():
                given = None if rows_MD is None else torch.from_numpy(rows_MD)
                logits_TV = model(torch.tensor(ids)[None], given)[0].numpy()
            out.append(Question(ids, first, logits_TV, rows_MD))
    return out


def own_kind(checkpoint: Path) -> list[Passage]:
    """Prompts that training may draw, with their replies: 40 of each text task, 60 of each about pictures."""
    model, tokenizer = load(checkpoint)
    samples = []
    for number, (name, (make, _)) in enumerate(TEXT_TASKS.items()):
        draw = Draw(np.random.default_rng((100, 10, number)), held_out=False)
        samples += [Sample(name, (make(draw),)) for _ in range(40)]
    draw = Draw(np.random.default_rng((100, 11)), held_out=False)
    for _ in range(60):
        samples.append(reading(draw, (int(draw.rng.integers(1, 4)), int(draw.rng.integers(3, 8)))))
        samples.append(shapes(draw, (int(draw.rng.integers(2, 5)), int(draw.rng.integers(2, 5)))))
        samples.append(two_pictures(draw, (int(draw.rng.integers(2, 4)), int(draw.rng.integers(3, 6)))))
    out = []
    for sample in samples:
        ids, _, rows_MD = encoded(model, tokenizer, sample)
        out.append(Passage(ids, rows_MD))
    return out


def other_text(checkpoint: Path) -> list[Passage]:
    return passages(checkpoint, [str(ROOT / "README.md"), str(ROOT / "docs")], Path(tempfile.gettempdir()))


def compared(
    asked: Sequence[Question],
    append: Callable[..., np.ndarray],
    rewind: Callable[[], None],
    pad_id: int | None = None,
) -> dict[str, float]:
    """KL divergence of a model's answers from the reference's, token by token, and how often both say the same."""
    divergences, agree = [], []
    for number, q in enumerate(asked):
        rewind()
        ours_V = append(q.ids[: q.first], *_places(q, number, pad_id))
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


def _places(q: Question, number: int, pad_id: int | None) -> tuple[None, list[Place]] | tuple[()]:
    """For a prompt with pictures, what `Engine.append` takes behind the ids."""
    if q.rows_MD is None:
        return ()
    picture = EncodedImage(len(q.rows_MD), q.rows_MD.astype(np.float16), f"picture {number}")
    rows: Iterator[int] = iter(range(len(q.rows_MD)))
    return None, [(picture, next(rows)) if i == pad_id else None for i in q.ids[: q.first]]


def asked_for(description: str | None) -> argparse.ArgumentParser:
    """The command line that measurements of quality share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(kimi_lite.__file__).parent / "nano")
    parser.add_argument("--n", type=int, default=30, help="prompts per task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one JSON line a recipe to this file")
    return parser


def main() -> None:
    parser = asked_for(__doc__)
    parser.add_argument("--recipes", default="", help="only those whose names this expression is found in")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python, for its mixes too")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    asked = {
        kind: questions(checkpoint, arguments.seed, arguments.n, pictures=kind == "pictures")
        for kind in ("text", "pictures")
    }
    samples = {"own": lambda: own_kind(checkpoint), "other": lambda: other_text(checkpoint)}

    def report(name: str, path: Path, bits: float) -> None:
        engine = Engine(path)
        record: dict[str, object] = {
            "bench": "quality",
            "model": checkpoint.name,
            "seed": arguments.seed,
            "recipe": name,
            "bits_per_weight": round(bits, 3),
        }
        line = f"{name:46} {bits:5.2f} bits a weight"
        for kind, several in asked.items():
            found = compared(several, engine.append, partial(engine.rewind, 0), engine.pad_id)
            record[kind] = {"prompts": len(several), **found}
            line += f"   {kind}: KL {found['kl_mean']:.2e}, 99th percentile {found['kl_p99']:.1e}, top-1 {found['top1']:.2%}"
        print(line, flush=True)
        if arguments.json:
            append_line(arguments.json, record)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", KimiLiteWarning)  # of int3 without a sample
        for name, (target, eight_bits, sample) in RECIPES.items():
            if not re.search(arguments.recipes, name):
                continue
            path = Path(folder) / "model.gguf"
            kept, plan.EIGHT_BITS = plan.EIGHT_BITS, eight_bits
            try:
                result = quantize(checkpoint, path, to=target, sample=samples.get(sample))  # type: ignore[arg-type]
            finally:
                plan.EIGHT_BITS = kept
            report(name, path, result.bits_per_weight)
        if arguments.llama:
            bf16 = Path(folder) / "bf16.gguf"
            result = quantize(checkpoint, bf16, to="bf16")
            command = [arguments.llama, "-c", LLAMA_QUANTIZE, str(bf16), folder, *LLAMA]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for name in LLAMA:
                path = Path(folder) / f"{name}.gguf"
                matrices = [t for t in GgufFile(path).tensors.values() if t.type != "F32"]
                weights = sum(int(np.prod(t.shape)) for t in matrices)
                report(f"llama.cpp's {name}", path, 8 * sum(t.data.nbytes for t in matrices) / weights)


if __name__ == "__main__":
    main()
