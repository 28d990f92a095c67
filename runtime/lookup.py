"""Guesses at the next tokens from where the last few stood before: speculation by prompt lookup.

An answer that transcribes, quotes, corrects or reformats says again what the prompt, the thinking or the answer itself has said. Where
the last tokens stood together before, what followed them then is a guess at what follows now. One step of the model runs
the newest token and the guesses behind it and gives logits after each; tokens are drawn from those as they would be one
by one, until a guess was wrong. The answer is the same to the bit; only time differs.

It does not always pay. A step of several tokens reads more experts than one of one (64 (1 - (58/64)^n) of 64 for n tokens, if they
choose independently), so n is chosen where

    tokens expected of a step / seconds of a step,   (1 + p + p^2 + ... + p^(n - 1)) / seconds(n)

is largest, n = 1 being no guess at all. p, the chance that a guess is right, follows Laplace's rule of succession: m tokens that
agreed before, and the guesses of this answer, late ones counting more. seconds(n) is what such steps took lately, and
until there were two of them, what the bytes that they read let expect beside one token's.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

LEAST = 3  # tokens that must have stood together before
MOST = 32  # of them are compared; more say nothing new
STEPS = (2, 4, 8)  # tokens of a step that checks guesses: the kernels' whole tiles
MOST_GUESSES = STEPS[-1] - 1
PLACES = 8  # where the last LEAST tokens stood, latest first, of which the longest match counts
FADE = 0.9  # what a step's record weighs after the next one
STEPS_KEPT = 4  # steps of a length whose time is remembered; the shortest counts, for disturbance only slows


class PromptLookup:
    """Of one answer."""

    def __init__(self, tokens: Sequence[int], room: int, n_plain: int, costs: Mapping[int, float]) -> None:
        """`tokens` of the prompt; `room` for those of the answer; ids from `n_plain` on are never guessed.

        `costs` gives for each n of STEPS how much longer a step of n tokens should be than one of one.
        """
        self._tokens = np.empty(len(tokens) + room, np.int32)
        self._tokens[: len(tokens)] = tokens
        self._n, self._n_plain, self._costs = len(tokens), n_plain, costs
        self._seconds = {n: deque[float](maxlen=STEPS_KEPT) for n in (1, *STEPS)}
        self._right = self._wrong = 0.0  # guesses of late

    def add(self, token: int) -> None:
        """A token that the answer goes on with."""
        self._tokens[self._n] = token
        self._n += 1

    def guess(self, most: int) -> list[int]:
        """What may come next, at most so many tokens; none where checking them would not pay."""
        at, matched = self._longest_match()
        if not matched:
            return []
        ahead = self._following(at, min(most, MOST_GUESSES))
        p = (matched + self._right) / (matched + 1 + self._right + self._wrong)
        best, rate = 1, 1 / self._cost(1)
        for n in STEPS:
            expected = (1 - p**n) / (1 - p)
            if n <= len(ahead) + 1 and expected / self._cost(n) > rate:
                best, rate = n, expected / self._cost(n)
        return ahead[: best - 1]

    def took(self, n_tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        if n_tokens in self._seconds:
            self._seconds[n_tokens].append(seconds)

    def checked(self, n_guessed: int, n_right: int) -> None:
        """So many guesses of a step were right, all in front of the first wrong one."""
        self._right = FADE * self._right + n_right
        self._wrong = FADE * self._wrong + (n_right < n_guessed)

    def _cost(self, n: int) -> float:
        """Seconds of a step of n tokens; until one of one token was timed, in units of it."""
        one = min(self._seconds[1], default=1.0)
        known = self._seconds[n]
        return min(known) if len(known) > 1 and self._seconds[1] else one * (self._costs[n] if n > 1 else 1)

    def _longest_match(self) -> tuple[int, int]:
        """Where the longest run of last tokens stood before, as the place after it, and its length; 0 if shorter than LEAST."""
        n, tokens = self._n, self._tokens
        if n <= LEAST:
            return 0, 0
        same = tokens[: n - LEAST] == tokens[n - LEAST]
        for k in range(1, LEAST):
            same &= tokens[k : n - LEAST + k] == tokens[n - LEAST + k]
        best = (0, 0)
        for start in np.flatnonzero(same)[: -PLACES - 1 : -1]:
            end = int(start) + LEAST
            before = min(MOST, end)
            differs = np.flatnonzero(tokens[end - before : end] != tokens[n - before : n])
            length = before - 1 - int(differs[-1]) if len(differs) else before
            if length > best[1]:
                best = end, length
        return best

    def _following(self, at: int, most: int) -> list[int]:
        """What followed then, and where that reaches the present, what would follow it: a run that repeats goes on."""
        ahead: list[int] = []
        for place in range(at, at + most):
            token = int(self._tokens[place]) if place < self._n else ahead[place - self._n]
            if token >= self._n_plain:
                break
            ahead.append(token)
        return ahead
