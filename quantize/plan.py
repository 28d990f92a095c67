"""What the output holds: every tensor's name, type and shape, where its rows come from, and the file's metadata.

Two walks over the published names give all outputs: the text model, standard or packed, and the image side, as an
`mmproj` GGUF of its own or packed behind the text model. Types per tensor are tables here, so that a change of recipe is
a change of data. Where a checkpoint holds a matrix in 4 bits already, the output takes it as it is if it can.

Dimension key:  D hidden   H heads   N/R/V/C no-rope, rope, value, latent   E experts   F expert width
"""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import KimiLiteWarning, ModelFileError
from kimi_lite.formats import compressed_tensors
from kimi_lite.formats.compressed_tensors import QuantizedTensor
from kimi_lite.formats.config import ModelConfig, read_json
from kimi_lite.formats.gguf_file import TensorSpec
from kimi_lite.formats.packed import LAYOUTS, PAGE, matrix_bytes, mlp_bytes
from kimi_lite.formats.safetensors_file import FLOATS, StoredTensor, open_checkpoint
from kimi_lite.formats.vocab import Vocab

Target = Literal["int4", "int3", "q8_0", "q4_0", "bf16", "f16"]
# The packed targets: the layout of the routed experts. They are nine tenths of the file and half of what a token reads; all
# else, which every token reads, is q4b32 and q8g32 in both.
PACKED = {"int4": "q4b32", "int3": "q3b32"}
Rows = Callable[[int, int], NDArray[np.float32]]  # start, count -> float32 [count, columns]
Stored = StoredTensor | QuantizedTensor

IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # recomputed at run time
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
# llama-quantize keeps the head above the base type; Q6_K, which it takes there, has no encoder in the gguf package.
HEAD_TYPE = {"Q4_0": "Q8_0"}
# Small tensors that feed every position: 3 % of the bytes a token reads; and the embedding, of which it reads one row. The
# head is left at 4 bits: 8 would add 12 % to what a token reads, for a KL of 0.00001 or 2 on kimi-vl-nano (benchmarks/quality.py).
EIGHT_BITS: tuple[str, ...] = ("attn_kv_a_mqa", "attn_k_b", "attn_v_b", "token_embd")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one matrix, wherever they come from."""

    rows: int
    columns: int
    read: Rows
    name: str = ""  # the published tensor that they are all of
    int4: QuantizedTensor | None = None  # if it is in 4 bits already


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output. `sources` are stacked; an MLP's are gate, up, down of each expert in turn."""

    name: str
    type: str  # a ggml type or a packed layout
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    kind: Literal["float", "matrix", "mlp"] = "matrix"

    @property
    def packed(self) -> bool:
        return self.type in LAYOUTS

    def spec(self) -> TensorSpec:
        """How the container declares it; packed tensors are plain bytes to it."""
        if not self.packed:
            return TensorSpec(self.name, self.type, self.shape)
        count, rows, columns = self.packed_shape()
        size = (
            mlp_bytes(self.type, rows, columns)
            if self.kind == "mlp"
            else matrix_bytes(self.type, rows, columns)
        )
        return TensorSpec(self.name, "I8", (count * size,))

    def packed_shape(self) -> tuple[int, int, int]:
        """count, rows and columns, as the table of packed tensors lists them."""
        per = 3 if self.kind == "mlp" else 1
        return len(self.sources) // per, self.sources[0].rows, self.sources[0].columns


class Checkpoint:
    """A published directory: configuration, vocabulary, tensors; hands out sources and accounts for all names."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ModelFileError(f"{directory}: not a directory; give the folder of a downloaded checkpoint")
        self.directory = directory
        compressed_tensors.check_config(read_json(directory / "config.json"), str(directory / "config.json"))
        self.config = ModelConfig.from_hf_dir(directory)
        self.vocab = Vocab.from_hf_dir(directory, self.config.text.vocab_size)
        self.tensors = open_checkpoint(directory)
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self._seen: set[str] = set()

    def tensor(self, name: str, *shape: int) -> Stored | None:
        """The tensor if it is there in this shape; what is wrong is collected and said at once by `finish`."""
        self._seen.add(name)
        found = self.tensors.get(name)
        if found is None and f"{name}_packed" in self.tensors and len(shape) == 2:
            self._seen |= {name.removesuffix("weight") + part for part in compressed_tensors.PARTS}
            return QuantizedTensor.of(self.tensors, name, (shape[0], shape[1]))
        if found is None:
            self.missing.append(name)
        elif found.dtype not in FLOATS:
            self.misshapen.append(
                f"{found.path.name}: {name} is stored as {found.dtype}, expected one of {', '.join(FLOATS)}"
            )
            return None
        elif found.shape != shape:
            self.misshapen.append(
                f"{found.path.name}: {name} has shape {list(found.shape)}, expected {list(shape)}"
            )
            return None
        return found

    def source(self, name: str, rows: int, columns: int) -> Source:
        stored = self.tensor(name, rows, columns)
        int4 = stored if isinstance(stored, QuantizedTensor) and stored.bits == 4 else None
        return Source(rows, columns, lambda start, n: _stored(stored).rows(start, n), name, int4)

    def vector(self, name: str, n: int) -> Source:
        stored = self.tensor(name, n)
        return Source(1, n, lambda start, count: _stored(stored).rows()[None])

    def shards(self) -> list[Path]:
        """The files that hold its tensors."""
        paths = (part.path for part in self.tensors.values())
        return sorted(set(paths))

    def finish(self) -> None:
        """Raise what is missing or misshapen; warn of what nobody asked for."""
        if self.missing:
            listed = ", ".join(sorted(self.missing)[:3])
            raise ModelFileError(
                f"{self.directory}: {len(self.missing)} tensors are missing, such as {listed}; the checkpoint is incomplete"
            )
        if self.misshapen:
            more = f"; and {n - 2} more" if (n := len(self.misshapen)) > 2 else ""
            raise ModelFileError(f"{self.directory}: {'; '.join(self.misshapen[:2])}{more}")
        depth = self.config.text.n_layers
        extra = re.compile(r"\.layers\.(\d+)\.")
        unknown = []
        for name in sorted(set(self.tensors) - self._seen):
            layer = extra.search(name)
            if not IGNORED.search(name) and not (layer and int(layer[1]) >= depth):
                unknown.append(name)
        if unknown:
            warnings.warn(
                f"{self.directory}: left out {len(unknown)} unknown tensors, such as {', '.join(unknown[:3])}",
                KimiLiteWarning,
                stacklevel=2,
            )


def _stored(tensor: Stored | None) -> Stored:
    assert tensor is not None, "a source was read although `finish` had raised"
    return tensor


def text_outputs(checkpoint: Checkpoint, target: Target) -> list[Output]:
    """The text model's tensors in file order."""
    if target in PACKED:
        return list(_text(checkpoint, "q4b32", PACKED[target]))
    return list(_text(checkpoint, target.upper(), None))


def _text(checkpoint: Checkpoint, base: str, routed: str | None) -> Iterator[Output]:
    """`routed` is the layout of packed routed experts, or None for standard GGUF."""
    c, p = checkpoint.config.text, checkpoint.config.text_prefix
    D, H, C, F = c.hidden_size, c.n_heads, c.kv_rank, c.expert_hidden_size

    def matrix(name: str, sources: Source | tuple[Source, ...]) -> Output:
        sources = sources if isinstance(sources, tuple) else (sources,)
        rows, columns = sources[0].rows, sources[0].columns
        shape = (rows, columns) if len(sources) == 1 else (len(sources), rows, columns)
        return Output(name, _kept(_type(name, base, columns), sources), shape, sources)

    def floats(name: str, source: Source) -> Output:
        shape = (source.columns,) if source.rows == 1 else (source.rows, source.columns)
        return Output(name, "F32", shape, (source,), "float")

    def mlps(at: str, kind: str, width: int, theirs: list[str]) -> Iterator[Output]:
        parts = [
            (
                checkpoint.source(f"{each}gate_proj.weight", width, D),
                checkpoint.source(f"{each}up_proj.weight", width, D),
                checkpoint.source(f"{each}down_proj.weight", D, width),
            )
            for each in theirs
        ]
        if routed:
            sources = tuple(s for part in parts for s in part)
            layout = _kept(routed if kind == "_exps" else base, sources)
            yield Output(f"{at}ffn{kind}.packed", layout, (), sources, "mlp")
            return
        for i, name in enumerate(("gate", "up", "down")):
            stacked = tuple(part[i] for part in parts)
            output = matrix(f"{at}ffn_{name}{kind}.weight", stacked)
            yield Output(
                output.name,
                output.type,
                (len(stacked), *output.shape[-2:]) if kind == "_exps" else output.shape,
                stacked,
            )

    yield matrix("token_embd.weight", checkpoint.source(f"{p}model.embed_tokens.weight", c.vocab_size, D))
    for layer in range(c.n_layers):
        theirs, at = f"{p}model.layers.{layer}.", f"blk.{layer}."
        yield floats(f"{at}attn_norm.weight", checkpoint.vector(f"{theirs}input_layernorm.weight", D))
        q_rows = H * (c.nope_dim + c.rope_dim)
        yield matrix(f"{at}attn_q.weight", checkpoint.source(f"{theirs}self_attn.q_proj.weight", q_rows, D))
        kv_a = checkpoint.source(f"{theirs}self_attn.kv_a_proj_with_mqa.weight", C + c.rope_dim, D)
        yield matrix(f"{at}attn_kv_a_mqa.weight", kv_a)
        yield floats(
            f"{at}attn_kv_a_norm.weight", checkpoint.vector(f"{theirs}self_attn.kv_a_layernorm.weight", C)
        )
        k_b, v_b = _expansion(checkpoint, f"{theirs}self_attn.kv_b_proj.weight")
        yield matrix(f"{at}attn_k_b.weight", k_b)
        yield matrix(f"{at}attn_v_b.weight", v_b)
        yield matrix(
            f"{at}attn_output.weight",
            checkpoint.source(f"{theirs}self_attn.o_proj.weight", D, H * c.value_dim),
        )
        yield floats(f"{at}ffn_norm.weight", checkpoint.vector(f"{theirs}post_attention_layernorm.weight", D))
        if layer < c.n_dense_layers:
            yield from mlps(at, "", c.dense_hidden_size, [f"{theirs}mlp."])
            continue
        yield floats(
            f"{at}ffn_gate_inp.weight", checkpoint.source(f"{theirs}mlp.gate.weight", c.n_experts, D)
        )
        yield floats(
            f"{at}exp_probs_b.bias",
            checkpoint.vector(f"{theirs}mlp.gate.e_score_correction_bias", c.n_experts),
        )
        yield from mlps(at, "_exps", F, [f"{theirs}mlp.experts.{e}." for e in range(c.n_experts)])
        yield from mlps(at, "_shexp", c.n_shared * F, [f"{theirs}mlp.shared_experts."])
    yield floats("output_norm.weight", checkpoint.vector(f"{p}model.norm.weight", D))
    yield matrix("output.weight", checkpoint.source(f"{p}lm_head.weight", c.vocab_size, D))


def _expansion(checkpoint: Checkpoint, name: str) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """k_b and v_b from kv_b_proj, which holds, head by head, N rows for keys and V rows for values, over C.

    k_b is transposed to [C, N] per head, because decoding takes queries into latent space.
    """
    c = checkpoint.config.text
    N, V, C, H = c.nope_dim, c.value_dim, c.kv_rank, c.n_heads
    stored = checkpoint.tensor(name, H * (N + V), C)

    def key(head: int) -> Rows:
        return lambda start, n: np.ascontiguousarray(
            _stored(stored).rows(head * (N + V), N).T[start : start + n]
        )

    def value(head: int) -> Rows:
        return lambda start, n: _stored(stored).rows(head * (N + V) + N + start, n)

    return tuple(Source(C, N, key(h)) for h in range(H)), tuple(Source(V, C, value(h)) for h in range(H))


def _type(name: str, base: str, columns: int) -> str:
    """The type of a matrix: the base type, or what its row length or its importance asks for."""
    if base == "q4b32":
        return "q8g32" if any(part in name for part in EIGHT_BITS) else base
    if base in ("Q8_0", "Q4_0") and columns % 32:
        return "F16"  # what llama.cpp falls back to
    return HEAD_TYPE.get(base, base) if name == "output.weight" else base


def _kept(kind: str, sources: tuple[Source, ...]) -> str:
    """q4g32 in place of q4b32 where all sources are in 4 bits already: its float16 scales hold them as they are."""
    return "q4g32" if kind == "q4b32" and all(source.int4 for source in sources) else kind


def vision_outputs(checkpoint: Checkpoint, target: Target) -> list[Output]:
    """The image side's tensors under llama.cpp's mmproj names, in file order."""
    return list(_vision(checkpoint, _vision_base(target)))


def _vision_base(target: Target) -> str:
    """A packed model has its image side in 8 bits: it is 2.7 % of the weights, and its kernels read that."""
    return "q8g32" if target in PACKED else "Q8_0" if target == "q4_0" else target.upper()


def _vision(checkpoint: Checkpoint, base: str) -> Iterator[Output]:
    v = checkpoint.config.vision
    assert v is not None
    W, joined, patch = v.hidden_size, v.hidden_size * v.merge**2, v.patch_size

    def pair(ours: str, theirs: str, rows: int, columns: int) -> Iterator[Output]:
        kind = "F16" if base == "Q8_0" and columns % 32 else base
        yield Output(
            f"{ours}.weight", kind, (rows, columns), (checkpoint.source(f"{theirs}.weight", rows, columns),)
        )
        yield Output(f"{ours}.bias", "F32", (rows,), (checkpoint.vector(f"{theirs}.bias", rows),), "float")

    def norm(ours: str, theirs: str) -> Iterator[Output]:
        for end in ("weight", "bias"):
            yield Output(f"{ours}.{end}", "F32", (W,), (checkpoint.vector(f"{theirs}.{end}", W),), "float")

    def thirds(at: str, theirs: str) -> Iterator[Output]:
        wqkv, bias = (
            checkpoint.tensor(f"{theirs}.weight", 3 * W, W),
            checkpoint.tensor(f"{theirs}.bias", 3 * W),
        )
        kind = "F16" if base == "Q8_0" and W % 32 else base
        for i, part in enumerate(("attn_q", "attn_k", "attn_v")):
            yield Output(f"{at}{part}.weight", kind, (W, W), (_third(wqkv, i, W),))
            yield Output(f"{at}{part}.bias", "F32", (W,), (_third_bias(bias, i, W),), "float")

    def flat(name: str, shape: tuple[int, ...]) -> Source:
        stored = checkpoint.tensor(name, *shape)
        size = int(np.prod(shape))
        return Source(1, size, lambda start, n: _stored(stored).rows().reshape(1, size))

    name = "vision_tower.patch_embed.proj"
    shape = (W, 3, patch, patch)
    yield Output(
        "v.patch_embd.weight",
        "F16" if base == "F16" else "F32",
        shape,
        (flat(f"{name}.weight", shape),),
        "float",
    )
    yield Output("v.patch_embd.bias", "F32", (W,), (checkpoint.vector(f"{name}.bias", W),), "float")
    table = flat("vision_tower.patch_embed.pos_emb.weight", (v.grid_height, v.grid_width, W))
    yield Output("v.position_embd.weight", "F32", (v.grid_height * v.grid_width, W), (table,), "float")
    for block in range(v.n_layers):
        theirs, at = f"vision_tower.encoder.blocks.{block}.", f"v.blk.{block}."
        yield from norm(f"{at}ln1", f"{theirs}norm0")
        if base == "q8g32":  # one matrix, as it is published and as the kernels take it
            yield from pair(f"{at}attn_qkv", f"{theirs}wqkv", 3 * W, W)
        else:
            yield from thirds(at, f"{theirs}wqkv")
        yield from pair(f"{at}attn_out", f"{theirs}wo", W, W)
        yield from norm(f"{at}ln2", f"{theirs}norm1")
        yield from pair(f"{at}ffn_up", f"{theirs}mlp.fc0", v.ffn_size, W)
        yield from pair(f"{at}ffn_down", f"{theirs}mlp.fc1", W, v.ffn_size)
    yield from norm("v.post_ln", "vision_tower.encoder.final_layernorm")
    yield from norm("mm.input_norm", "multi_modal_projector.pre_norm")
    yield from pair("mm.1", "multi_modal_projector.linear_1", joined, joined)
    yield from pair("mm.2", "multi_modal_projector.linear_2", checkpoint.config.text.hidden_size, joined)


def _third(wqkv: Stored | None, part: int, W: int) -> Source:
    """Rows of q, k or v; their order inside stays the published one, as llama.cpp's converter leaves it."""
    return Source(W, W, lambda start, n: _stored(wqkv).rows(part * W + start, n))


def _third_bias(bias: Stored | None, part: int, W: int) -> Source:
    return Source(1, W, lambda start, n: _stored(bias).rows(part * W, W)[None])


def text_metadata(checkpoint: Checkpoint, target: Target, outputs: list[Output]) -> dict[str, Any]:
    """The model file's keys: general, deepseek2, tokenizer, and for a packed file the table of its tensors, with the
    image side's keys if it is among `outputs`."""
    c, directory = checkpoint.config.text, checkpoint.directory
    metadata: dict[str, Any] = {
        "general.architecture": "deepseek2",
        "general.type": "model",
        "general.name": checkpoint.config.name.replace("-", " ").replace("_", " ").strip(),
        "general.size_label": f"{c.n_experts}x{c.expert_hidden_size}",
        "general.license": "mit",
        "general.quantization_version": 2,
        **c.gguf_metadata(),
        **checkpoint.vocab.gguf_metadata(),
    }
    specials = checkpoint.vocab.specials
    ids = {
        "bos": c.bos_id if c.bos_id is not None else specials.get("[BOS]"),
        # Turns end with <|im_end|>; the checkpoints' own eos key names [EOS], which ends documents.
        "eos": specials.get("<|im_end|>", c.eos_id),
        "padding": c.pad_id if c.pad_id is not None else specials.get("[PAD]"),
    }
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    template = directory / "chat_template.jinja"
    if template.exists():
        try:
            metadata["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{template}: cannot be read as text ({error}); download it again") from None
    if target not in PACKED:
        return metadata | {"general.file_type": FILE_TYPES[target.upper()]}
    packed = [output for output in outputs if output.packed]
    metadata |= {
        "general.alignment": PAGE,
        "kimi_lite.packed.version": 1,
        "kimi_lite.packed.name": [o.name for o in packed],
        "kimi_lite.packed.layout": [o.type for o in packed],
        "kimi_lite.packed.kind": [o.kind for o in packed],
    }
    for i, key in enumerate(("count", "rows", "columns")):
        metadata[f"kimi_lite.packed.{key}"] = [o.packed_shape()[i] for o in packed]
    sees = any(o.name == "v.patch_embd.weight" for o in outputs)
    return metadata | (_image_metadata(checkpoint) if sees else {})


def vision_metadata(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """The keys of an mmproj file."""
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": checkpoint.config.name.replace("-", " ").replace("_", " ").strip(),
        "general.file_type": FILE_TYPES[_vision_base(target)],
        **_image_metadata(checkpoint),
        "general.quantization_version": 2,
    }


def _image_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The image side's keys, and our own for the patch budget, which llama.cpp does not store."""
    v, image = checkpoint.config.vision, checkpoint.config.image
    assert v is not None
    assert image is not None
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": checkpoint.config.text.hidden_size,
        "clip.vision.image_size": v.grid_height * v.patch_size,
        "clip.vision.patch_size": v.patch_size,
        "clip.vision.embedding_length": v.hidden_size,
        "clip.vision.feed_forward_length": v.ffn_size,
        "clip.vision.block_count": v.n_layers,
        "clip.vision.attention.head_count": v.n_heads,
        "clip.vision.image_mean": list(image.mean),
        "clip.vision.image_std": list(image.std),
        "clip.projector_type": "kimivl",
        "clip.use_gelu": True,
        "clip.vision.projector.scale_factor": v.merge,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "kimi_lite.in_token_limit": image.token_limit,
    }
