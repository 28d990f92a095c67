"""From logits to a token: penalties, bias, temperature, top-k, top-p, min-p, a seeded draw.

Applied in this order, each on what the one before left. Temperature 0 takes the largest logit, the lowest id on a tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. The default, greedy, repeats exactly; the makers recommend 0.6 to 0.8 for the Thinking
    models."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: a new one each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 to below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, 1 for none"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "-100 to 100"),
        ):
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)}; expected {expected}")


class Sampler:
    """Draws tokens for one answer."""

    def __init__(self, options: SamplingOptions, n_tokens: int) -> None:
        """`n_tokens` is how many ids have a meaning; the padded rest of the logits is never drawn."""
        self.options, self.n_tokens = options, n_tokens
        self._random = np.random.Generator(np.random.PCG64(options.seed))

    def draw(self, logits_V: NDArray[np.float32], so_far: Sequence[int]) -> int:
        """The next token, given the logits and the tokens of prompt and answer so far."""
        o, scores_V = self.options, logits_V[: self.n_tokens].astype(np.float64)
        if so_far and (o.repetition_penalty != 1 or o.presence_penalty):
            seen = np.unique(np.asarray(so_far))
            seen = seen[seen < self.n_tokens]
            was = scores_V[seen]
            scores_V[seen] = (
                np.where(was > 0, was / o.repetition_penalty, was * o.repetition_penalty) - o.presence_penalty
            )
        for token, bias in o.logit_bias.items():
            if not 0 <= token < self.n_tokens:
                raise UsageError(
                    f"logit_bias names token {token}; the vocabulary has 0 to {self.n_tokens - 1}"
                )
            scores_V[token] += bias
        if o.temperature == 0:
            return int(scores_V.argmax())
        # Sorted once; every filter keeps a prefix, and the most likely token always stays.
        order = np.argsort(-scores_V, kind="stable")
        if o.top_k:
            order = order[: o.top_k]
        scores = scores_V[order] / o.temperature
        p = np.exp(scores - scores[0])
        p /= p.sum()
        n = len(p)
        if o.top_p < 1:
            n = int(np.searchsorted(np.cumsum(p), o.top_p)) + 1
        if o.min_p:
            n = min(n, int((p >= o.min_p * p[0]).sum()))
        p = p[:n] / p[:n].sum()
        return int(order[min(n - 1, int(np.searchsorted(np.cumsum(p), self._random.random(), side="right")))])
