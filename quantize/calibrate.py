"""Rounding by what the matrices are asked: the text model runs over sample text while it is being quantized.

Rounding each weight to the nearest step makes the weights' error least, not the error of the products, and a product's
inputs are far from random: channels rise and fall together. So each matrix is rounded against the second moments of
the inputs that it really gets (`encode.calibrated`).

A file's tensors stand in the order in which a token meets them, so one walk over them does both: a tensor is rounded,
and with the rounded tensor the sample goes on. Each matrix thereby learns from inputs that already carry the rounding of
all before it. Of the sample the residual stream and the normalised rows are kept, of the checkpoint one matrix or one
expert at a time.

An expert learns from the tokens that choose it, each with its router weight, and a little from others (`OTHERS`), so that
one that hardly any token chooses is rounded for what the layer usually sees. A matrix that the checkpoint holds in 4 bits stays
as it is.

Dimension key:  T tokens of the sample   n of one sequence   D hidden   H heads   N/R/V/C no-rope, rope, value, latent
E experts   A active   F expert width   O, I out and in features
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.config import ModelConfig, TextConfig
from kimi_lite.formats.packed import join_mlp, pack_quantized, unpack, weights_of
from kimi_lite.quantize.encode import GRIDS, calibrated, stored, triangular
from kimi_lite.quantize.plan import Output, Source

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Factors = tuple[F32, F32]

# Of the mean squared input, added to each: few tokens say nothing about most directions. More where all inputs are alike, as in a
# sample of one line repeated: rounding errors of a float32 factor reach some 2^-24 of the largest eigenvalue, which is up to
# as many times the mean as there are columns.
DAMPING = (0.01, 0.1, 1.0)
OTHERS = 512  # tokens that an expert sees beside its own,
THEIR_WEIGHT = 0.1  # and the router weight that they are given
ROWS_AT_ONCE = 2048  # of the embedding and the head
WIDEST = 1408  # columns of a down projection that are rounded for each other: an expert's; wider MLPs are sums of such


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of the sample that is read from its beginning: token ids [n], and for its image tokens the rows of pictures."""

    ids: Sequence[int]
    rows_MD: F32 | None = None


class Calibration:
    """Takes the outputs of the text model in file order, and gives their bytes, rounded for what the passages ask."""

    def __init__(self, config: ModelConfig, passages: Sequence[Passage]) -> None:
        self.config, self.pad_id = config.text, config.media_pad_id
        self.ids_T = np.concatenate([np.asarray(p.ids, np.int32) for p in passages])
        self.rows_MD = [p.rows_MD for p in passages if p.rows_MD is not None]
        ends = np.cumsum([len(p.ids) for p in passages]).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.x_TD: F32  # the residual stream
        self.h_TD: F32  # its rows, normalised
        self.seen: Factors  # its second moments, factored
        self.kept: dict[str, list[F32]] = {}  # of the layer at hand: what attention and the router need
        self.steps: dict[str, Callable[[Output], Iterator[Bytes]]] = {
            "token_embd.weight": self._embed,
            "attn_norm.weight": self._normalise,
            "attn_output.weight": self._attend,
            "ffn_norm.weight": self._normalise,
            "ffn.packed": self._mlp,
            "ffn_exps.packed": self._experts,
            "ffn_shexp.packed": self._mlp,
            "output_norm.weight": self._normalise,
            "output.weight": self._project,
            "attn_q.weight": self._project,
            "attn_kv_a_mqa.weight": self._project,
        }

    def sample(self) -> list[NDArray[Any]]:
        """All that the passages say: tokens, where each ends, rows of pictures."""
        return [self.ids_T, np.array(self.spans, np.int64), *self.rows_MD]

    def pieces(self, output: Output) -> Iterator[Bytes]:
        """The tensor's bytes, piece by piece; the sample has then passed it."""
        name = output.name
        step = self.steps.get(name.split(".", 2)[-1] if name.startswith("blk.") else name, self._keep)
        try:
            yield from step(output)
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error}") from None

    def _keep(self, output: Output) -> Iterator[Bytes]:
        """A tensor that is not calibrated: norms, router, and what is stored in 8 bits."""
        part, weights = output.name.split(".")[-2], []
        for source in output.sources:
            data = stored(source, output.type)
            weights.append(_weights(data, output.type, source.rows, source.columns))
            yield data
        self.kept[part] = weights

    def _embed(self, output: Output) -> Iterator[Bytes]:
        (source,) = output.sources
        self.x_TD = np.empty((len(self.ids_T), source.columns), np.float32)
        for start in range(0, source.rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, source.rows - start)
            data = stored(source, output.type, start, n)
            here = (self.ids_T >= start) & (self.ids_T < start + n)
            self.x_TD[here] = _weights(data, output.type, n, source.columns)[self.ids_T[here] - start]
            yield data
        if self.rows_MD:
            self.x_TD[self.ids_T == self.pad_id] = np.concatenate(self.rows_MD)

    def _normalise(self, output: Output) -> Iterator[Bytes]:
        yield from self._keep(output)
        weight_1D = self.kept[output.name.split(".")[-2]][0]
        self.h_TD = _norm(self.x_TD, weight_1D, self.config.rms_eps)
        self.seen = _factored(self.h_TD)

    def _project(self, output: Output) -> Iterator[Bytes]:
        """A matrix whose inputs are the normalised rows: q, kv_a and the head."""
        (source,), parts = output.sources, []
        for start in range(0, source.rows, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, source.rows - start)
            data, weight_OI = _rounded(source, output.type, self.seen, start, n)
            if output.name != "output.weight":  # after which nothing comes
                parts.append(weight_OI)
                self.kept[output.name.split(".")[-2]] = [np.concatenate(parts)]
            yield data

    def _attend(self, output: Output) -> Iterator[Bytes]:
        """All sequences through the layer's attention, then o, which their heads' sums meet."""
        c = self.config
        (q_OD,), (kv_a_OD,), (norm_C,) = (self.kept[k] for k in ("attn_q", "attn_kv_a_mqa", "attn_kv_a_norm"))
        k_HCN, v_HVC = np.stack(self.kept["attn_k_b"]), np.stack(self.kept["attn_v_b"])
        sums_TX = np.empty((len(self.x_TD), c.n_heads * c.value_dim), np.float32)
        for first, end in self.spans:
            h_nD = self.h_TD[first:end]
            q_nHK = (h_nD @ q_OD.T).reshape(len(h_nD), c.n_heads, -1) * np.float32(c.softmax_scale)
            kv_nX = h_nD @ kv_a_OD.T
            c_nC = _norm(kv_nX[:, : c.kv_rank], norm_C, c.kv_norm_eps)
            turn = _turns(len(h_nD), c)
            k_nR = _rotated(kv_nX[:, c.kv_rank :], turn)
            future_nn = np.triu(np.full((len(h_nD),) * 2, -np.inf, np.float32), 1)
            for head in range(c.n_heads):
                q_nN, q_nR = q_nHK[:, head, : c.nope_dim], _rotated(q_nHK[:, head, c.nope_dim :], turn)
                key_nK = np.concatenate([c_nC @ k_HCN[head], k_nR], 1)
                score_nn = np.concatenate([q_nN, q_nR], 1) @ key_nK.T
                score_nn += future_nn
                score_nn -= score_nn.max(-1, keepdims=True)
                np.exp(score_nn, out=score_nn)
                at = slice(head * c.value_dim, (head + 1) * c.value_dim)
                value_nV = score_nn @ (c_nC @ v_HVC[head].T)
                sums_TX[first:end, at] = value_nV / score_nn.sum(-1, keepdims=True)
        (source,) = output.sources
        data, o_DX = _rounded(source, output.type, _factored(sums_TX))
        self.x_TD += sums_TX @ o_DX.T
        self.kept.clear()
        yield data

    def _experts(self, output: Output) -> Iterator[Bytes]:
        c = self.config
        (router_ED,), (bias_E,) = self.kept["ffn_gate_inp"], self.kept["exp_probs_b"]
        score_TE = _sigmoid(self.h_TD @ router_ED.T)
        chosen_TA = np.argsort(-(score_TE + bias_E), axis=1, kind="stable")[:, : c.n_active]
        weight_TA = np.take_along_axis(score_TE, chosen_TA, 1)
        weight_TA *= c.routed_scale / (weight_TA.sum(1, keepdims=True) + np.float32(1e-20))
        others = np.unique(np.linspace(0, len(self.h_TD) - 1, OTHERS).astype(int))
        for e in range(c.n_experts):
            tokens, place = np.nonzero(chosen_TA == e)
            rows = np.concatenate([tokens, others])
            weight_n1 = np.full((len(rows), 1), THEIR_WEIGHT, np.float32)
            weight_n1[: len(tokens), 0] = weight_TA[tokens, place]
            data, y_nD = self._swiglu(output, 3 * e, self.h_TD[rows], weight_n1)
            self.x_TD[tokens] += y_nD[: len(tokens)]
            yield data

    def _mlp(self, output: Output) -> Iterator[Bytes]:
        data, y_TD = self._swiglu(output, 0, self.h_TD, np.ones((len(self.h_TD), 1), np.float32), self.seen)
        self.x_TD += y_TD
        yield data

    def _swiglu(
        self, output: Output, first: int, h_nD: F32, weight_n1: F32, seen: Factors | None = None
    ) -> tuple[Bytes, F32]:
        """One expert's bytes, and its outputs times the weights of the tokens that it is shown."""
        gate, up, down = output.sources[first : first + 3]
        to_round = output.type in GRIDS
        if seen is None:
            seen = _factored(h_nD * weight_n1) if to_round else self.seen
        gate_bytes, gate_FD = _rounded(gate, output.type, seen)
        up_bytes, up_FD = _rounded(up, output.type, seen)
        down_DF, y_nD, quantized = down.read(0, down.rows), np.zeros_like(h_nD), []
        for start in range(0, down.columns, WIDEST):
            part = slice(start, start + WIDEST)
            g_nF = h_nD @ gate_FD[part].T
            g_nF *= _sigmoid(g_nF)
            g_nF *= h_nD @ up_FD[part].T
            g_nF *= weight_n1
            if to_round:
                quantized.append(calibrated(down_DF[:, part], output.type, *_factored(g_nF)))
                down_DF[:, part] = weights_of(*quantized[-1], output.type)[:, : g_nF.shape[1]]
            y_nD += g_nF @ down_DF[:, part].T
        if to_round:
            q_DF, scale_DG = (np.concatenate(each, 1) for each in zip(*quantized, strict=True))
            down_bytes = pack_quantized(q_DF, scale_DG, output.type)
        else:
            down_bytes = stored(down, output.type)
        return join_mlp(gate_bytes, up_bytes, down_bytes, output.type, gate.columns), y_nD


def _rounded(
    source: Source, kind: str, seen: Factors, start: int = 0, n: int | None = None
) -> tuple[Bytes, F32]:
    """Rows of the matrix as they are stored, and the weights that the stored form stands for."""
    n = source.rows - start if n is None else n
    if kind in GRIDS:
        data = pack_quantized(*calibrated(source.read(start, n), kind, *seen), kind)
    else:
        data = stored(source, kind, start, n)
    return data, _weights(data, kind, n, source.columns)


def _weights(data: Bytes, kind: str, rows: int, columns: int) -> F32:
    if kind == "F32":
        return data.view(np.float32).reshape(rows, columns)
    return unpack(data, kind, rows, columns)


def _factored(x_nI: F32) -> Factors:
    """U and D of the sum of x x' over the rows, damped."""
    with np.errstate(over="ignore", invalid="ignore"):
        m_II = x_nI.T @ x_nI
    mean = np.diagonal(m_II).mean()
    if not np.isfinite(mean):
        raise ModelFileError(
            "the sample's activations are not finite numbers here; the checkpoint is damaged"
        )
    diagonal_I = np.diagonal(m_II).copy()
    for damping in DAMPING:
        np.fill_diagonal(m_II, diagonal_I + np.float32(damping) * mean + np.float32(1e-12))
        try:
            return triangular(m_II)
        except np.linalg.LinAlgError:
            continue
    raise AssertionError("moments as large as their own mean beside them have no factor")


def _norm(x_nI: F32, weight: F32, eps: float) -> F32:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x_nI / np.sqrt((x_nI**2).mean(-1, keepdims=True) + np.float32(eps)) * weight)


def _sigmoid(x: F32) -> F32:
    with np.errstate(over="ignore"):  # 1 / inf is the 0 that is meant
        return np.asarray(1 / (1 + np.exp(-x)))


def _turns(n: int, c: TextConfig) -> NDArray[np.complex64]:
    angle = np.arange(n)[:, None] * c.rope_theta ** (-np.arange(0, c.rope_dim, 2) / c.rope_dim)
    return np.asarray(np.exp(1j * angle), np.complex64)


def _rotated(x_nR: F32, turn: NDArray[np.complex64]) -> F32:
    """Neighbouring channels are a complex number; position n turns it."""
    return (np.ascontiguousarray(x_nR).view(np.complex64) * turn).view(np.float32)
