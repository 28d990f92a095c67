"""From logits to a token: penalties, bias, temperature, top-k, top-p, min-p, a seeded draw.

Applied in this order, each on what the one before left. Temperature 0 takes the largest logit, the lowest id on a tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError, UsageError


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
            ("seed", self.seed is None or self.seed >= 0, "0 or more, or none"),
        ):
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)}; expected {expected}")


# Sorting a whole vocabulary takes 20 ms, nearly half of a token on a CPU, and hardly any token matters: so those are sorted that
# weigh this much beside the likeliest, and more of them only while they leave the draw open.
FAINT = (1e-5, 1e-10, 1e-20, 0.0)


NOT_NUMBERS = (
    "the model's output is not a number any more, so the file's weights are damaged or were converted wrongly; "
    "download it again, or quantize the checkpoint anew"
)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model found a token, by itself: before temperature, penalties, bias, filters and grammars."""

    token: int
    logprob: float  # natural logarithm of its probability
    top: tuple[tuple[int, float], ...]  # the likeliest tokens at this place and theirs, the likeliest first


def likelihood(logits_V: NDArray[np.float32], token: int, n_top: int, n_tokens: int) -> Likelihood:
    """Of a drawn token among the first `n_tokens`, those that mean something; on a tie the lower id goes first."""
    scores_V = logits_V[:n_tokens].astype(np.float64)
    scores_V -= scores_V.max()
    scores_V -= np.log(np.exp(scores_V).sum())
    n_top = min(n_top, n_tokens)
    least = np.partition(scores_V, -n_top)[-n_top] if n_top else np.inf
    near = np.flatnonzero(scores_V >= least)
    first = near[np.argsort(-scores_V[near], kind="stable")][:n_top]
    return Likelihood(token, float(scores_V[token]), tuple((int(i), float(scores_V[i])) for i in first))


class Sampler:
    """Draws tokens for one answer."""

    def __init__(self, options: SamplingOptions, n_tokens: int) -> None:
        """`n_tokens` is how many ids have a meaning; the padded rest of the logits is never drawn."""
        self.options, self.n_tokens = options, n_tokens
        self._random = np.random.Generator(np.random.PCG64(options.seed))

    def draw(
        self,
        logits_V: NDArray[np.float32],
        so_far: Sequence[int],
        allowed_V: NDArray[np.bool_] | None = None,
    ) -> int:
        """The next token, given the logits, the tokens of prompt and answer so far, and which may come at all.

        Raises ModelFileError where logits are not numbers: whatever was drawn from them would look like an answer.
        """
        o, scores_V = self.options, logits_V[: self.n_tokens].astype(np.float64)
        if not np.isfinite(scores_V.max()):  # nor is the largest, as soon as one of them is not a number
            raise ModelFileError(NOT_NUMBERS)
        if so_far and (o.repetition_penalty != 1 or o.presence_penalty):
            seen = np.fromiter(set(so_far), np.int64)
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
        if allowed_V is not None:
            scores_V[~allowed_V[: self.n_tokens]] = -np.inf
        if o.temperature == 0:
            return int(scores_V.argmax())
        scores_V = (scores_V - scores_V.max()) / o.temperature
        weight_V = np.exp(scores_V)  # beside the likeliest token's
        kept = np.arange(len(weight_V))
        if o.top_k or o.top_p < 1 or o.min_p:
            tries = (self._kept(scores_V, weight_V, least) for least in FAINT)
            kept = next(found for found in tries if found is not None)
        below = np.cumsum(weight_V[kept])
        place = int(np.searchsorted(below, self._random.random() * below[-1], side="right"))
        return int(kept[min(place, len(kept) - 1)])

    def _kept(
        self, scores_V: NDArray[np.float64], weight_V: NDArray[np.float64], least: float
    ) -> NDArray[np.intp] | None:
        """What the filters keep, most likely first; None if that cannot be told from the tokens that weigh `least`."""
        o, near = self.options, np.flatnonzero(weight_V >= least)
        # Sorted once; every filter keeps a prefix, and the most likely token always stays.
        order = near[np.argsort(-scores_V[near], kind="stable")]
        others = weight_V.sum(where=weight_V < least)
        whole = others == 0  # the rest cannot be drawn
        weight = weight_V[order]
        below = np.cumsum(weight)
        total = below[-1] + others
        n = len(order) + 1  # until a filter ends among them
        if o.top_k and o.top_k <= len(order):
            n, total = o.top_k, below[o.top_k - 1]
        elif o.top_k and not whole:
            return None
        if o.top_p < 1:
            n = min(n, int(np.searchsorted(below, o.top_p * total)) + 1)
        if o.min_p and weight[-1] < o.min_p:
            n = min(n, int((weight >= o.min_p).sum()))
        return order[:n] if n <= len(order) or whole else None
