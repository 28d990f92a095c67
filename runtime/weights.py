"""A model file as the runtime needs it: configuration, vocabulary, and every tensor as a view of the memory map.

Reads packed int4 files and standard GGUF files of Kimi-VL and Moonlight alike, in llama.cpp's latent form or in the
older one that keeps the key and value expansion as one matrix. An image side in the same file is left to
runtime/vision. Of a packed file nothing is copied but norms, routers and biases. A standard GGUF's matrices are packed
at load, losslessly, one after the other into memory of their own, and the pages that they came from are let go;
`kimi-lite pack` does that once for all. In the older form the expansion is dequantized to float32 (8 MB a layer at full
size).

Dimension key:  D hidden   V vocabulary or value width   H heads   N/R/C no-rope, rope, latent   E experts   F width
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from kimi_lite.errors import DoesNotFitError, KimiLiteWarning, ModelFileError
from kimi_lite.formats.config import TextConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import matrix_bytes, mlp_bytes
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime import kernels
from kimi_lite.runtime.kernels import AttentionLayer, FeedForwardLayer, Float, Matrix, Mlp, Router
from kimi_lite.runtime.tensors import Tensors, holds_image_side, of_image_side

# Types that the kernels multiply; a file may hold others only where they are turned into floats at load.
MATRIX_TYPES = frozenset("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL IQ4_XS Q4_K Q5_K Q6_K".split())


@dataclass(frozen=True)
class Layer:
    """One layer's two halves, as the kernels take them."""

    attention: AttentionLayer
    feed_forward: FeedForwardLayer


@dataclass(frozen=True)
class Weights:
    """A whole text model."""

    path: Path
    config: TextConfig
    vocab: Vocab
    embed: Matrix  # [V, D]
    layers: tuple[Layer, ...]
    norm_D: Float
    head: Matrix  # [V, D]
    n_bytes: int  # of the file
    fixed_bytes: int  # of weights that every step reads
    routed_bytes: int  # of all routed experts
    packed_bytes: int  # held in memory of their own, because they were packed at load
    file: GgufFile

    @property
    def image_side(self) -> GgufFile | None:
        """The file, if it holds the image side too."""
        return self.file if holds_image_side(self.file) else None

    def step_bytes(self, n_tokens: int) -> int:
        """Of weights, read by a step: n tokens that choose A of E experts independently meet E (1 - (1 - A/E)^n) of them."""
        c = self.config
        return self.fixed_bytes + round(self.routed_bytes * (1 - (1 - c.n_active / c.n_experts) ** n_tokens))


def open_weights(path: Path, *, pack: bool = True) -> Weights:
    """Map a model file and check every tensor's presence and shape.

    Args:
        pack: pack a standard GGUF's matrices in memory; without, they run where they lie, several times slower.

    Raises:
        ModelFileError: damage, another model, a missing or misshapen tensor, a type that no kernel reads.
        DoesNotFitError: what must be packed exceeds the memory that is free.
    """
    file = GgufFile(path, without=("tokenizer.ggml.merges",))  # they follow from the ranks
    where = str(path)
    config = TextConfig.from_gguf(file.metadata, where)
    vocab = Vocab.from_gguf(file.metadata, where)
    if vocab.size != config.vocab_size:
        raise ModelFileError(f"{path}: {vocab.size} tokens are named, but the model has {config.vocab_size}")
    read = _Tensors(file, pack)
    if holds_image_side(file):  # read by runtime/vision, when the first picture comes
        read.skip(*(name for name in file.tensors if of_image_side(name)))
    c = config
    D = c.hidden_size
    wrong = [
        f"{what} {size}"
        for what, size in (
            ("embedding_length", D),
            ("kv_lora_rank", c.kv_rank),
            ("no-rope width", c.nope_dim),
            ("attention width", c.n_heads * c.value_dim),
            ("expert width", c.expert_hidden_size),
            ("feed-forward width", c.dense_hidden_size),
        )
        if size % 32
    ]
    if wrong or c.rope_dim % 16:
        raise ModelFileError(
            f"{path}: {', '.join(wrong) or 'rope width'} is no multiple of 32; the kernels need that"
        )
    if pack:
        read.check_room()
    embed = read.matrix("token_embd.weight", c.vocab_size, D, in_place=True)
    layers = tuple(_layer(read, c, index) for index in range(c.n_layers))
    norm, head = read.floats("output_norm.weight", D), read.matrix("output.weight", c.vocab_size, D)
    read.finish()
    routed = sum(read.bytes[n] for n in read.bytes if "_exps" in n)
    fixed = sum(read.bytes.values()) - routed - read.bytes["token_embd.weight"]
    for key in [k for k in file.metadata if k.startswith("tokenizer.")]:
        del file.metadata[key]  # some 20 MB that `vocab` now holds in its own form
    return Weights(
        path,
        config,
        vocab,
        embed,
        layers,
        norm,
        head,
        path.stat().st_size,
        fixed,
        routed,
        sum(read.packed_bytes.values()),
        file,
    )


def _layer(read: "_Tensors", c: TextConfig, index: int) -> Layer:
    D, H, F, at = c.hidden_size, c.n_heads, c.expert_hidden_size, f"blk.{index}."
    moe = index >= c.n_dense_layers
    k_b, v_b = _expansion(read, c, at)
    attention = AttentionLayer(
        norm_D=read.floats(f"{at}attn_norm.weight", D),
        q=read.matrix(f"{at}attn_q.weight", H * (c.nope_dim + c.rope_dim), D),
        kv_a=read.matrix(f"{at}attn_kv_a_mqa.weight", c.kv_rank + c.rope_dim, D),
        kv_norm_C=read.floats(f"{at}attn_kv_a_norm.weight", c.kv_rank),
        k_b=k_b,
        v_b=v_b,
        o=read.matrix(f"{at}attn_output.weight", D, H * c.value_dim),
        eps=c.rms_eps,
        kv_eps=c.kv_norm_eps,
        scale=c.softmax_scale,  # of the whole head, N + R, although the products run over C + R
    )
    norm = read.floats(f"{at}ffn_norm.weight", D)
    if not moe:
        dense = read.mlp(f"{at}ffn", "", c.dense_hidden_size, D)
        return Layer(attention, FeedForwardLayer(norm, c.rms_eps, dense))
    router = Router(
        read.floats(f"{at}ffn_gate_inp.weight", c.n_experts, D),
        read.floats(f"{at}exp_probs_b.bias", c.n_experts),
        c.n_active,
        c.routed_scale,
    )
    shared = read.mlp(f"{at}ffn", "_shexp", c.n_shared * F, D)
    routed = read.mlp(f"{at}ffn", "_exps", F, D, c.n_experts)
    used = np.zeros(c.n_experts, np.int64)
    return Layer(attention, FeedForwardLayer(norm, c.rms_eps, shared, routed, router, used))


def _expansion(read: "_Tensors", c: TextConfig, at: str) -> tuple[Matrix, Matrix]:
    """k_b and v_b, from their own tensors or from the older joint one, [H·(N+V), C]."""
    N, V, C, H = c.nope_dim, c.value_dim, c.kv_rank, c.n_heads
    if f"{at}attn_kv_b.weight" not in read.file.tensors:
        return read.matrix(f"{at}attn_k_b.weight", C, N, H), read.matrix(f"{at}attn_v_b.weight", V, C, H)
    read.skip(f"{at}attn_k_b.weight", f"{at}attn_v_b.weight")  # some files keep both
    joint_HXC = read.floats(f"{at}attn_kv_b.weight", H * (N + V), C).reshape(H, N + V, C)
    k_HCN = np.ascontiguousarray(joint_HXC[:, :N].transpose(0, 2, 1))
    v_HVC = np.ascontiguousarray(joint_HXC[:, N:])
    return (
        Matrix("F32", k_HCN.reshape(-1).view(np.uint8), C, N, H),
        Matrix("F32", v_HVC.reshape(-1).view(np.uint8), V, C, H),
    )


class _Tensors(Tensors):
    """The text model's tensors: counts their bytes, packs what must be packed, and accounts for all names."""

    def __init__(self, file: GgufFile, pack: bool) -> None:
        super().__init__(file)
        self._pack = pack
        self.bytes = dict[str, int]()
        self.packed_bytes = dict[str, int]()  # what was packed at load takes, in memory of its own

    def floats(self, name: str, *shape: int) -> Float:
        values = super().floats(name, *shape)
        self.bytes[name] = self.file.tensors[name].data.size
        return values

    def matrix(self, name: str, rows: int, columns: int, count: int = 1, *, in_place: bool = False) -> Matrix:
        """`in_place` leaves a ggml type as it lies, for a matrix of which single rows are looked up."""
        shape = (rows, columns) if count == 1 else (count, rows, columns)
        if name in self.packed:
            layout, data = self.stored(
                name, "matrix", count, rows, columns, lambda s: count * matrix_bytes(s, rows, columns)
            )
            self.bytes[name] = data.size
            return Matrix(layout, data, rows, columns, count)
        tensor = self.get(name, *shape)
        self.bytes[name] = tensor.data.size
        if tensor.type not in MATRIX_TYPES:
            raise ModelFileError(
                f"{self.file.path}: {name} has the type {tensor.type}, which no kernel reads; quantize the model again"
            )
        matrix = Matrix(tensor.type, tensor.data, rows, columns, count)
        if in_place or not self._pack or kernels.packed_as(tensor.type) is None:
            return matrix
        matrix = kernels.pack(matrix)
        self.file.forget(tensor)
        self.bytes[name] = self.packed_bytes[name] = matrix.data.size
        return matrix

    def mlp(self, stem: str, kind: str, F: int, D: int, count: int = 1) -> Mlp:
        name = f"{stem}{kind}.packed"
        if name in self.file.tensors:
            layout, data = self.stored(name, "mlp", count, F, D, lambda s: count * mlp_bytes(s, F, D))
            self.bytes[name] = data.size
            return Mlp(F, D, count, layout, data)
        gate, up = (self.matrix(f"{stem}_{part}{kind}.weight", F, D, count) for part in ("gate", "up"))
        down = self.matrix(f"{stem}_down{kind}.weight", D, F, count)
        return Mlp(F, D, count, matrices=(gate, up, down))

    def check_room(self) -> None:
        """Raise DoesNotFitError if what must be packed at load exceeds the memory that is free."""
        needed = 0
        for tensor in self.file.tensors.values():
            layout = kernels.packed_as(tensor.type) if len(tensor.shape) > 1 else None
            if layout and tensor.name != "token_embd.weight":
                rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
                needed += matrix_bytes(layout, rows, columns)
        free = psutil.virtual_memory().available
        if needed > free:
            raise DoesNotFitError(
                f"{self.file.path}: a standard GGUF is packed in memory, which takes {needed / 1e9:.1f} GB; "
                f"{free / 1e9:.1f} GB are free. Write it once as a packed file, which runs from disk: "
                f"kimi-lite pack {self.file.path} packed.gguf"
            )

    def skip(self, *names: str) -> None:
        self.asked.update(names)

    def finish(self) -> None:
        unknown = sorted(set(self.file.tensors) - self.asked)
        if unknown:
            warnings.warn(
                f"{self.file.path}: ignoring {len(unknown)} unknown tensors, such as {', '.join(unknown[:10])}",
                KimiLiteWarning,
                stacklevel=3,
            )
