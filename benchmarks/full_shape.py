"""How fast does the full-size model run here, and in how much memory?

    python benchmarks/full_shape.py make packed FILE     a 9 GB packed file of random weights, in the default recipe
    python benchmarks/full_shape.py make int3 FILE       a 7 GB one with its routed experts in 3 bits
    python benchmarks/full_shape.py make gguf FILE       a 10.5 GB GGUF with llama.cpp's Q4_K_M mix of types
    python benchmarks/full_shape.py make checkpoint DIR  a 32 GB bf16 checkpoint, sparse on disk
    python benchmarks/full_shape.py run FILE             prefill and decode, speeds, bytes and memory

Real weights are not needed to measure speed and memory: every tensor has the published name and shape (27 layers, 64
experts, 163,840 tokens), and values are scaled so that activations stay near 1. One tile of valid random blocks a
type is repeated, so a file takes minutes, not hours.

`run` is `kimi-lite bench` (kimi_lite/bench.py says what is measured) and ends with one JSON line, which has the commit
as well.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.config import ModelConfig, TextConfig
from kimi_lite.formats.gguf_file import GgufWriter
from kimi_lite.formats.packed import LAYOUTS, PAGE, ROWS, pack_quantized
from kimi_lite.formats.safetensors_file import StoredTensor
from kimi_lite.formats.vocab import Vocab
from kimi_lite.quantize.plan import PACKED, Checkpoint, Output, Target, text_metadata, text_outputs
from kimi_lite.runtime.reference.random_checkpoint import SPECIAL_NAMES, text_shapes, write_side_files

FULL = TextConfig(
    vocab_size=163840,
    hidden_size=2048,
    n_layers=27,
    n_heads=16,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    dense_hidden_size=11264,
    n_dense_layers=1,
    n_experts=64,
    n_active=6,
    n_shared=2,
    expert_hidden_size=1408,
    routed_scale=2.446,
    rms_eps=1e-5,
    rope_theta=800000.0,
    context_length=131072,
    bos_id=163584,
    eos_id=163585,
    pad_id=163839,
)
# Layers whose down projections llama-quantize gives more bits in Q4_K_M.
MORE_BITS = {1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26}
# Stored values as least, most, step, and their typical size in weights: the scale is 1/sqrt(I) over it. From -7 or -6 to as
# much: with -8, all weights lean one way, and all tokens choose the same experts.
STORED = {"q4b32": (1, 16, 1, 4.6), "q3b32": (1, 8, 2, 4.6), "q8g32": (-127, 128, 1, 73.0)}
# Bytes a block; where the float16 scale stands in it; typical |scale multiplier| x |q|: the scale is 1/sqrt(I) over it.
BLOCKS = {"Q4_K": (144, 0, 150.0), "Q5_0": (22, 0, 9.0), "Q6_K": (210, 208, 1150.0), "Q8_0": (34, 0, 74.0)}
TILE = 4096


def ranks() -> list[bytes]:
    """163,584 tokens: all strings of one and two bytes, then enough of three."""
    ones = [bytes([b]) for b in range(256)]
    twos = [a + b for a in ones for b in ones]
    threes = [pair + end for end in (b"a", b"b") for pair in twos]
    return (ones + twos + threes)[: FULL.vocab_size - 256]


class Shapes(Checkpoint):
    """A checkpoint of sizes only: enough for the plan of a file."""

    def __init__(self) -> None:
        self.directory = Path("random")
        self.config = ModelConfig(name="random-full-shape", text=FULL)
        names = ranks()
        self.vocab = Vocab(names, {n: len(names) + i for i, n in SPECIAL_NAMES.items()}, FULL.vocab_size)
        self.tensors, self.missing, self.misshapen, self._seen = {}, [], [], set()

    def tensor(self, name: str, *shape: int) -> StoredTensor | None:
        return None


def q4_k_m(output: Output) -> str:
    """The type that llama-quantize's Q4_K_M gives a tensor of this model."""
    if output.kind == "float":
        return "F32"
    name, layer = output.name, int(output.name.split(".")[1]) if output.name.startswith("blk") else -1
    if name == "output.weight":
        return "Q6_K"
    if "attn_k_b" in name:
        return "Q5_0"
    if "ffn_down_exps" in name:
        return "Q8_0" if layer in MORE_BITS else "Q5_0"
    if "ffn_down" in name and (layer in MORE_BITS or layer == 0):
        return "Q6_K"
    return "Q4_K"


def tile(kind: str, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A stretch of valid random blocks of one type for rows of this many columns."""
    scale = columns**-0.5
    if kind in STORED:
        low, high, step, size = STORED[kind]
        q_OI = (step * rng.integers(low, high, (ROWS * TILE, 32))).astype(np.int8)
        values = (rng.uniform(0.5, 1.5, (ROWS * TILE, 1)) * scale / size).astype(np.float16)
        if LAYOUTS[kind].scale_bytes == 1:  # the upper bits of such a value are one that a byte holds
            values = (values.view(np.uint16) & 0xFF80).view(np.float16)
        return pack_quantized(q_OI, values, kind)
    size, at, typical = BLOCKS[kind]
    blocks = rng.integers(0, 256, (TILE, size), dtype=np.uint8)
    d = (rng.uniform(0.5, 1.5, TILE) * scale / typical).astype(np.float16)
    blocks[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    if kind == "Q4_K":  # the minimum centres the values
        blocks[:, 2:4] = (d * np.float16(7.5)).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """One line more in a results file."""
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")


def make(kind: str, path: Path) -> None:
    checkpoint, rng = Shapes(), np.random.default_rng(0)
    target: Target = {"packed": "int4", "int3": "int3"}.get(kind, "q8_0")  # type: ignore[assignment]
    outputs = text_outputs(checkpoint, target)
    if kind == "gguf":
        outputs = [Output(o.name, q4_k_m(o), o.shape, o.sources, o.kind) for o in outputs]
    metadata = text_metadata(checkpoint, target, outputs)
    start = time.monotonic()
    with GgufWriter(path, metadata, [o.spec() for o in outputs], PAGE if target in PACKED else 32) as out:
        for output in outputs:
            columns, left = output.sources[0].columns, output.spec().n_bytes
            if output.kind == "float":
                values = rng.standard_normal(left // 4).astype(np.float32) * np.float32(columns**-0.5)
                out.write(
                    np.ones(left // 4, np.float32)
                    if "norm" in output.name
                    else values * ("bias" not in output.name)
                )
                continue
            data = tile(output.type, columns, rng)
            while left:
                n = min(left, data.size)
                out.write(data[:n])
                left -= n
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


def make_checkpoint(directory: Path) -> None:
    """Every tensor in its place; all but the first shard's worth of bytes are holes that read as zeros."""
    write_side_files(directory, FULL, None, ranks())
    index: dict[str, str] = {}
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in text_shapes(FULL, ""):
        n_bytes = 2 * int(np.prod(shape))
        if size + n_bytes > 5 << 30:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 20).astype(np.float32) * 0.02).view(np.uint32) >> 16
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in tensors:
            n_bytes = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
            index[name] = file
            at += n_bytes
        head = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            if number == 1:
                for _ in range(64):
                    out.write(noise.astype(np.uint16).tobytes())
            out.truncate(8 + len(head) + at)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run(
    path: Path, prompts: list[int], depths: list[int], decode: int, threads: int | None
) -> dict[str, Any]:
    """What `kimi-lite bench` measures, with the commit that it was measured at."""
    from kimi_lite.bench import measure

    report = measure(path, prompts=prompts, depths=depths, decode=decode, threads=[threads])
    return {"bench": "full_shape", "commit": commit(), **report.as_json()}


def commit() -> str:
    """The checkout's, or nothing outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("kind", choices=["packed", "int3", "gguf", "checkpoint"])
    making.add_argument("path", type=Path)
    running = verbs.add_parser("run")
    running.add_argument("path", type=Path)
    running.add_argument("--prompt", type=int, nargs="+", default=[256])
    running.add_argument("--depth", type=int, nargs="+", default=[256])
    running.add_argument("--decode", type=int, default=32)
    running.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        a = arguments
        print(json.dumps(run(a.path, a.prompt, a.depth, a.decode, a.threads)))
    elif arguments.kind == "checkpoint":
        make_checkpoint(arguments.path)
    else:
        make(arguments.kind, arguments.path)


if __name__ == "__main__":
    main()
