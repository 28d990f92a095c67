"""Prefill and decode: a model file, its cache, and an iterator of tokens.

The engine keeps the tokens that its cache stands for. A new prompt reuses the longest prefix they share, so a second
turn of a chat computes only what is new; the result is bit for bit what it would be from scratch.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.model import forward
from kimi_lite.runtime.sampling import Sampler, SamplingOptions
from kimi_lite.runtime.tokenizer import Tokenizer
from kimi_lite.runtime.weights import open_weights

PREFILL_CHUNK = (
    256  # tokens a call: enough to read each expert once for many, and progress several times a second
)
DEFAULT_CONTEXT = 32768

Progress = Callable[[int, int], None]  # prompt tokens done, in all


class Engine:
    """One open model. Not for two threads at once."""

    def __init__(self, path: Path, *, context: int | None = None, threads: int | None = None) -> None:
        """Map `path` and reserve room for `context` tokens: by default the model's own limit, at most 32768.

        Raises:
            ModelFileError: the file is missing, damaged or another model's.
            UsageError: `context` is not positive or beyond the model's limit.
        """
        self.weights = open_weights(path)
        limit = self.weights.config.context_length
        if context is not None and not 1 <= context <= limit:
            raise UsageError(f"a context of {context} tokens was asked for; {path.name} allows 1 to {limit}")
        self.context = context or min(limit, DEFAULT_CONTEXT)
        self.tokenizer = Tokenizer(self.weights.vocab)
        self.stop_ids = self.tokenizer.stop_ids
        self.cache = LatentCache(self.weights.config, self.context)
        self.tokens: list[int] = []  # those that the cache holds
        self.finish_reason = ""
        self.n_reused = 0  # prompt tokens that the last prefill found in the cache
        kernels.set_threads(threads)

    def rewind(self, n: int) -> None:
        """Keep the first n cached tokens."""
        self.cache.rewind(n)
        del self.tokens[n:]

    def append(self, ids: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        """Run tokens after the cached ones; the logits [V] that follow the last."""
        assert ids, "nothing to append"
        logits_V = np.empty(0, np.float32)
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            logits_V = forward(self.weights, self.cache, np.asarray(chunk, np.int32))
            self.tokens += chunk
            if on_progress:
                on_progress(start + len(chunk), len(ids))
        return logits_V

    def prefill(self, prompt: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        """Make the cache hold exactly `prompt`, computing only what it does not hold yet; the logits [V] after it.

        Raises:
            UsageError: the prompt leaves no room for an answer.
        """
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.context} with the answer; "
                f"shorten it, or ask for more with --context (this model: up to {self.weights.config.context_length})"
            )
        shared = 0
        for ours, new in zip(
            self.tokens, prompt[:-1], strict=False
        ):  # the last is run again: its logits are needed
            if ours != new:
                break
            shared += 1
        self.rewind(shared)
        self.n_reused = shared
        return self.append(prompt[shared:], on_progress)

    def generate(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[int]:
        """Tokens of the answer, without the stop token. Closing the iterator cancels between tokens.

        Afterwards `finish_reason` is "stop", "length" (max_tokens), "context" (no room left) or "cancelled".
        """
        self.finish_reason = "cancelled"
        sampler = Sampler(options, self.n_named)
        logits_V = self.prefill(prompt, on_progress)
        n = 0
        while True:
            token = sampler.draw(logits_V, self.tokens)
            if token in self.stop_ids:
                self.finish_reason = "stop"
                return
            yield token
            n += 1
            if max_tokens is not None and n >= max_tokens:
                self.finish_reason = "length"
                return
            if len(self.tokens) + 1 >= self.context:
                self.finish_reason = "context"
                return
            logits_V = self.append([token])

    @property
    def n_named(self) -> int:
        """Ids from here on are padding rows that mean nothing."""
        specials = self.weights.vocab.specials.values()
        return max(specials, default=len(self.weights.vocab.ranks) - 1) + 1
