"""The text model once more, slowly, in float64 numpy: the oracle of the CPU runtime. Shares no code with it.

Reads a packed or standard GGUF through the gguf package and unpacks by the documented layout. Attention is expanded,
token by token. With `contract=True` it also rounds what the runtime rounds: activations to int8 in groups of 32 in
front of every product but the router's and those with float weights, and all that attention multiplies.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


class NumpyModel:
    def __init__(self, path: Path, *, contract: bool) -> None:
        reader = gguf.GGUFReader(path)
        self.contract = contract
        self.tensors = {t.name: t for t in reader.tensors}
        self.meta: dict[str, Any] = {
            name.removeprefix("deepseek2."): field.contents() for name, field in reader.fields.items()
        }
        keys = ("name", "layout", "kind", "count", "rows", "columns")
        columns = [self.meta.get(f"kimi_lite.packed.{key}", []) for key in keys]
        self.packed = {name: rest for name, *rest in zip(*columns, strict=True)}
        self.cache: dict[str, Any] = {}
        m = self.meta
        self.H, self.C, self.R = (
            m["attention.head_count"],
            m["attention.kv_lora_rank"],
            m["rope.dimension_count"],
        )
        self.N, self.V = m["attention.key_length_mla"] - self.R, m["attention.value_length_mla"]

    def weight(self, name: str) -> F64:
        """A matrix, or a stack of them, as float64."""
        if name not in self.cache:
            if name in self.packed:
                layout, _, count, rows, cols = self.packed[name]
                data = np.asarray(self.tensors[name].data).view(np.uint8).reshape(count, -1)
                out = np.stack([unpack(d, layout, rows, cols) for d in data])
                self.cache[name] = out[0] if count == 1 else out
            else:
                t = self.tensors[name]
                self.cache[name] = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
        return np.asarray(self.cache[name])

    def expert(self, at: str, kind: str, e: int) -> tuple[F64, F64, F64]:
        name = f"{at}ffn{kind}.packed"
        if name not in self.packed:
            parts = [self.weight(f"{at}ffn_{p}{kind}.weight") for p in ("gate", "up", "down")]
            return tuple(p[e] if p.ndim == 3 else p for p in parts)  # type: ignore[return-value]
        key = f"{name}/{e}"
        if key not in self.cache:
            layout, _, count, F, D = self.packed[name]
            data = np.asarray(self.tensors[name].data).view(np.uint8).reshape(count, -1)[e]
            block = D // 32 * RUNS[layout]
            blocks = data[: F // 16 * 2 * block].reshape(-1, 2, block)
            down = data[F // 16 * 2 * block :]
            self.cache[key] = (
                unpack(blocks[:, 0].reshape(-1), layout, F, D),
                unpack(blocks[:, 1].reshape(-1), layout, F, D),
                unpack(down, layout, D, F),
            )
        return self.cache[key]  # type: ignore[no-any-return]

    def product(self, w_OI: F64, x_I: F64, exact: bool = False) -> F64:
        return w_OI @ (x_I if exact or not self.contract else int8_groups(x_I))

    def exact_type(self, name: str) -> bool:
        return name not in self.packed and self.tensors[name].tensor_type.name in ("F32", "F16", "BF16")

    def logits(self, ids: list[int]) -> F64:
        """Logits after each token: [T, vocabulary]."""
        m = self.meta
        eps, latents, keys, out = m["attention.layer_norm_rms_epsilon"], {}, {}, []  # type: ignore[var-annotated]
        for p, token in enumerate(ids):
            x = self.weight("token_embd.weight")[token].copy()
            for layer in range(m["block_count"]):
                at = f"blk.{layer}."
                h = norm(x, self.weight(f"{at}attn_norm.weight"), eps)
                q_HK = self.linear(f"{at}attn_q.weight", h).reshape(self.H, -1)
                kv = self.linear(f"{at}attn_kv_a_mqa.weight", h)
                c = norm(kv[: self.C], self.weight(f"{at}attn_kv_a_norm.weight"), 1e-6)
                k = self.turn(kv[self.C :], p)
                if self.contract:
                    c, k = cached(c), cached(k)
                latents.setdefault(layer, []).append(c)
                keys.setdefault(layer, []).append(k)
                c_SC, k_SR = np.stack(latents[layer]), np.stack(keys[layer])
                heads = []
                for h_index in range(self.H):
                    q_N, q_R = q_HK[h_index, : self.N], self.turn(q_HK[h_index, self.N :], p)
                    k_CN, v_VC = (
                        self.weight(f"{at}attn_k_b.weight")[h_index],
                        self.weight(f"{at}attn_v_b.weight")[h_index],
                    )
                    exact = self.exact_type(f"{at}attn_k_b.weight")
                    q_C = self.product(k_CN, q_N, exact)
                    if self.contract:
                        q_C, q_R = int8_groups(q_C), int8_groups(padded(q_R))[: self.R]
                    score = (c_SC @ q_C + k_SR @ q_R) / np.sqrt(self.N + self.R)
                    a = np.exp(score - score.max())
                    u_C = two_digits(a) @ turned(c_SC) if self.contract else a @ c_SC
                    heads.append(self.product(v_VC, u_C / a.sum(), exact))
                x = x + self.linear(f"{at}attn_output.weight", np.concatenate(heads))
                x = x + self.feed_forward(at, layer, norm(x, self.weight(f"{at}ffn_norm.weight"), eps))
            out.append(self.linear("output.weight", norm(x, self.weight("output_norm.weight"), eps)))
        return np.stack(out)

    def linear(self, name: str, x: F64) -> F64:
        return self.product(self.weight(name), x, self.exact_type(name))

    def feed_forward(self, at: str, layer: int, h: F64) -> F64:
        m = self.meta
        if layer < m["leading_dense_block_count"]:
            return self.swiglu(at, "", 0, h)
        score = 1 / (1 + np.exp(-self.weight(f"{at}ffn_gate_inp.weight") @ h))
        biased = score + self.weight(f"{at}exp_probs_b.bias")
        chosen = sorted(range(len(score)), key=lambda e: (-biased[e], e))[: m["expert_used_count"]]
        total = sum(score[e] for e in chosen)
        y = sum(score[e] / total * m["expert_weights_scale"] * self.swiglu(at, "_exps", e, h) for e in chosen)
        return np.asarray(y + self.swiglu(at, "_shexp", 0, h))

    def swiglu(self, at: str, kind: str, e: int, h: F64) -> F64:
        gate, up, down = self.expert(at, kind, e)
        exact = f"{at}ffn{kind}.packed" not in self.packed and self.exact_type(f"{at}ffn_gate{kind}.weight")
        g = self.product(gate, h, exact)
        return self.product(down, g / (1 + np.exp(-g)) * self.product(up, h, exact), exact)

    def turn(self, x_R: F64, p: int) -> F64:
        angle = p * self.meta["rope.freq_base"] ** (-np.arange(0, self.R, 2) / self.R)
        pairs = (x_R[0::2] + 1j * x_R[1::2]) * np.exp(1j * angle)
        return np.stack([pairs.real, pairs.imag], -1).reshape(-1)


RUNS = {"q4b32": 272, "q3b32": 208, "q4g32": 288, "q8g32": 544}  # bytes of 16 rows × 32 channels


def unpack(data: NDArray[np.uint8], layout: str, rows: int, columns: int) -> F64:
    """By docs/formats.md, one weight at a time in plain index arithmetic (vectorised over the file)."""
    run = RUNS[layout]
    G, r, k = columns // 32, np.arange(rows)[:, None], np.arange(columns)[None]
    start = (r // 16 * G + k // 32) * run
    c = k % 32
    if layout == "q3b32":
        byte = data[start + np.minimum(c // 8, 2) * 64 + r % 16 * 4 + c % 4].astype(int)
        three = [
            data[start + 64 * t + r % 16 * 4 + c % 4].astype(int) >> np.where(c < 28, 0, 4) & 1
            for t in range(3)
        ]
        u = np.where(c < 24, byte >> np.where(c % 8 < 4, 1, 5) & 7, three[0] + 2 * three[1] + 4 * three[2])
        q = 2.0 * u - 8
    elif layout != "q8g32":
        byte = data[start + c // 8 * 64 + r % 16 * 4 + c % 4]
        q = np.where(c % 8 < 4, byte & 15, byte >> 4).astype(np.float64) - 8
    else:
        q = data[start + c // 4 * 64 + r % 16 * 4 + c % 4].view(np.int8).astype(np.float64)
    if layout in ("q4b32", "q3b32"):
        byte = data[start + run - 16 + r % 16].astype(np.float64)
        sign, exponent, fraction = byte // 128, byte // 8 % 16, byte % 8
        return np.asarray(q * (-1) ** sign * (1 + fraction / 8) * 2 ** (exponent - 15))
    at = start + run - 32 + r % 16 * 2
    scale = (data[at].astype(np.uint16) | (data[at + 1].astype(np.uint16) << 8)).view(np.float16)
    return np.asarray(q * scale.astype(np.float64))


def norm(x: F64, w: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt((x**2).mean() + eps) * w)


def activation_scale(largest: NDArray[Any]) -> NDArray[Any]:
    """The least powers of two of which 127 reach the largest values; 1 where they are zero."""
    fraction, exponent = np.frexp(largest / 127)  # fraction · 2^exponent, 0.5 ≤ fraction < 1
    return np.where(largest > 0, np.exp2(np.where(fraction == 0.5, exponent - 1, exponent)), 1.0)


def int8_groups(x_I: F64) -> F64:
    x = x_I.reshape(-1, 32)
    scale = activation_scale(np.abs(x).max(1, keepdims=True))
    return np.asarray(np.rint(x / scale) * scale).reshape(-1)


def padded(x: F64) -> F64:
    return np.pad(x, (0, -len(x) % 32))


def steps(x: F64) -> F64:
    """Rounded to int8 steps along the last axis, one group: the scale is absmax / 127 in float16."""
    scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float32).astype(np.float16).astype(np.float64)
    return np.asarray(np.clip(np.rint(x / np.maximum(scale, 1e-30)), -127, 127) * scale)


def cached(x: F64) -> F64:
    """A cached row: groups of 32 channels."""
    return steps(padded(x).reshape(-1, 32)).reshape(-1)[: len(x)]


def turned(c_SC: F64) -> F64:
    """Cached rows as the weighted sum reads them: rounded once more, each channel over groups of 32 positions."""
    return np.concatenate([steps(c_SC[i : i + 32].T).T for i in range(0, len(c_SC), 32)])


def two_digits(a: F64) -> F64:
    """Softmax weights in int8 groups of 32 positions, with a second digit in the first group and the last one's part."""
    n = len(a)
    digits = int8_groups(padded(a))[:n]
    for i in {0, n // 32 * 32} - {n}:
        digits[i : i + 32] += int8_groups(padded(a[i : i + 32] - digits[i : i + 32]))[: len(a[i : i + 32])]
    return np.asarray(digits)
