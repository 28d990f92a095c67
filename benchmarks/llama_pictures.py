"""Whose image rows should go into llama.cpp: those of its own image side (mtmd), or those of our tower?

    python benchmarks/llama_pictures.py [--n 60] [--json FILE]      needs llama-cpp-python

Asks kimi-vl-nano about held-out pictures through `LlamaEngine`, with rows from either encoder of the same f16 mmproj
file in the same place of the same prompt, and counts exact answers. Also compares rows with the float32 reference's
rms: over all pictures that come out as the right number of tokens, and over noise of a size that needs no resizing,
where only the towers differ.
"""

import argparse
import ctypes
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_shape import append_line
from numpy.typing import NDArray
from PIL import Image

import kimi_lite
from kimi_lite.api import Model
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.llama_bindings import LLAMA, bindings
from kimi_lite.runtime.llama_engine import LlamaEngine
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.image import process
from kimi_lite.runtime.reference.model import load
from kimi_lite.runtime.vision import EncodedImage, ImageEncoder

NANO = Path(kimi_lite.__file__).parent / "nano"
TASKS = ("colour", "shape", "count", "read")


@contextmanager
def mtmd_encoder(text: Path, mmproj: Path, width: int) -> Iterator[Any]:
    """llama.cpp's own encoder: a function from an RGB picture to its rows [M, D]."""
    from llama_cpp import mtmd_cpp as mtmd

    llama = bindings(LLAMA)
    quiet = llama.api.llama_log_callback(lambda level, text, data: None)
    mtmd.mtmd_log_set(quiet, None)
    mtmd.mtmd_helper_log_set(quiet, None)
    model = llama.api.llama_model_load_from_file(str(text).encode(), llama.api.llama_model_default_params())
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.warmup = parameters.print_timings = False
    context = mtmd.mtmd_init_from_file(str(mmproj).encode(), model, parameters)
    marker = mtmd.mtmd_default_marker()

    def encode(picture: Image.Image) -> NDArray[np.float32]:
        pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB")))
        pointer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pointer)
        chunks, prompt = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_input_text()
        prompt.text, prompt.text_len, prompt.parse_special = marker, len(marker), True
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                assert mtmd.mtmd_encode_chunk(context, chunk) == 0
                shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), width)
                rows = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape).copy()
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return rows

    yield encode
    mtmd.mtmd_free(context)
    llama.free_model(model)


def noise(seed: int) -> Image.Image:
    """Blocks of noise, 112 × 112 pixels: whole tokens, and as many as need no enlarging."""
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((112, 112), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=60, help="pictures of each task")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", type=Path, help="append one JSON line to this file")
    arguments = parser.parse_args()
    reference, _ = load(NANO)
    report: dict[str, Any] = {
        "bench": "llama-pictures",
        "llama-cpp-python": bindings(LLAMA).version,
        "n": arguments.n,
        "seed": arguments.seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        text, mmproj = Path(folder) / "nano.gguf", Path(folder) / "nano-mmproj.gguf"
        quantize(NANO, text, to="f16")
        width = reference.config.text.hidden_size
        ours = ImageEncoder(mmproj, width, ImageCache(None))
        model = Model(LlamaEngine(text), ours)
        samples = {task: held_out(arguments.seed, arguments.n)[task][: arguments.n] for task in TASKS}
        with mtmd_encoder(text, mmproj, width) as theirs:

            def true_rows(picture: Image.Image) -> NDArray[np.float32]:
                patches, grid = process(picture, ours.image)
                with torch.inference_mode():
                    return np.asarray(
                        reference.encode_images(torch.from_numpy(patches)[None], grid)[0].numpy()
                    )

            def error(rows: NDArray[Any], exact: NDArray[np.float32]) -> float:
                return float(np.linalg.norm(rows - exact) / np.linalg.norm(exact))

            right = {"kimi-lite": dict.fromkeys(TASKS, 0), "mtmd": dict.fromkeys(TASKS, 0)}
            errors: dict[str, list[float]] = {"kimi-lite": [], "mtmd": []}
            n_other = 0
            for task in TASKS:
                for sample in samples[task]:
                    picture, turn = sample.pictures[0], sample.turns[-1]
                    exact, rows = true_rows(picture), theirs(picture)
                    digest = hashlib.sha256(rows.tobytes()).hexdigest()
                    mine = ours.encode([picture])[0]
                    if len(rows) == len(exact):
                        errors["mtmd"].append(error(rows, exact))
                    else:
                        n_other += 1
                    errors["kimi-lite"].append(error(mine.rows_MD, exact))
                    other = EncodedImage(len(rows), rows.astype(np.float16), digest)
                    for name, image in (("kimi-lite", mine), ("mtmd", other)):
                        said = model.ask(turn.question, images=[image], max_tokens=96).text.strip()
                        right[name][task] += said == turn.answer
            plain = [noise(seed) for seed in range(8)]
            towers = {
                "kimi-lite": [error(ours.encode([p])[0].rows_MD, true_rows(p)) for p in plain],
                "mtmd": [error(theirs(p), true_rows(p)) for p in plain],
            }
    report |= {
        "right": right,
        "row_error": {name: [round(min(e), 4), round(max(e), 4)] for name, e in errors.items()},
        "row_error_without_resizing": {
            name: [round(min(e), 4), round(max(e), 4)] for name, e in towers.items()
        },
        "other_number_of_tokens": n_other,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        append_line(arguments.json, report)


if __name__ == "__main__":
    main()
