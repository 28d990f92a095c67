"""Prefill and decode: a model file, its cache, and an iterator of tokens.

The engine keeps the tokens that its cache stands for. A new prompt reuses the longest prefix they share, so a second
turn of a chat computes only what is new; the result is bit for bit what it would be from scratch. All image tokens
have one id, so they are told apart by their picture's digest.

`BaseEngine` is that loop, whoever runs the model: `Engine` on the kernels of this package, `LlamaEngine`
(llama_engine.py) on llama.cpp.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.config import TextConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime import kernels, model
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.model import Spliced
from kimi_lite.runtime.sampling import Sampler, SamplingOptions
from kimi_lite.runtime.template import IMAGE_PAD
from kimi_lite.runtime.tokenizer import Tokenizer
from kimi_lite.runtime.vision import EncodedImage
from kimi_lite.runtime.weights import open_weights

PREFILL_CHUNK = 512  # tokens a pass: at full size each expert is read once for about 48 of them
DEFAULT_CONTEXT = 32768

Progress = Callable[[int, int], None]  # prompt tokens done, in all
OnLayer = Callable[[int], None]  # layers of a pass done
Place = tuple[EncodedImage, int] | None  # the picture and the row that an image token stands for


class BaseEngine:
    """One open model. Not for two threads at once."""

    chunk = PREFILL_CHUNK
    image_side: GgufFile | None = None  # the model's file, if it holds the image side too

    def __init__(self, path: Path, config: TextConfig, vocab: Vocab, context: int | None) -> None:
        limit = config.context_length
        if context is not None and not 1 <= context <= limit:
            raise UsageError(f"a context of {context} tokens was asked for; {path.name} allows 1 to {limit}")
        self.path, self.config, self.vocab = path, config, vocab
        self.context = context or min(limit, DEFAULT_CONTEXT)
        self.tokenizer = Tokenizer(vocab)
        self.stop_ids = self.tokenizer.stop_ids
        self.tokens: list[int] = []  # those that the cache holds
        self.seen: list[object] = []  # what each stands for: its id, or picture and row
        self.pad_id = vocab.specials.get(IMAGE_PAD, -1)
        self.finish_reason = ""
        self.n_reused = 0  # prompt tokens that the last prefill found in the cache

    def forward(self, ids: Sequence[int], places: Sequence[Place], on_layer: OnLayer) -> NDArray[np.float32]:
        """One step of at most `chunk` tokens after the cached ones; the logits [V] that follow the last.

        `on_layer` is told how many layers are done.
        """
        raise NotImplementedError

    def rewind(self, n: int) -> None:
        """Keep the first n cached tokens."""
        del self.tokens[n:], self.seen[n:]

    def append(
        self,
        ids: Sequence[int],
        on_progress: Progress | None = None,
        pictures: Sequence[Place] | None = None,
    ) -> NDArray[np.float32]:
        """Run tokens after the cached ones; the logits [V] that follow the last.

        `pictures` gives, beside each id, the picture and the row that an image token stands for, or None.
        """
        assert ids, "nothing to append"
        pictures = pictures or [None] * len(ids)
        logits_V = np.empty(0, np.float32)
        for start in range(0, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            places = pictures[start : start + self.chunk]

            def on_layer(n: int, start: int = start, n_tokens: int = len(chunk)) -> None:
                if on_progress:  # a pass takes seconds, so its layers count
                    on_progress(start + n * n_tokens // self.config.n_layers, len(ids))

            logits_V = self.forward(chunk, places, on_layer)
            self.tokens += chunk
            self.seen += _meaning(chunk, places)
        return logits_V

    def prefill(
        self,
        prompt: Sequence[int],
        on_progress: Progress | None = None,
        pictures: Sequence[EncodedImage] = (),
    ) -> NDArray[np.float32]:
        """Make the cache hold exactly `prompt`, computing only what it does not hold yet; the logits [V] after it.

        Args:
            pictures: those whose image tokens stand in the prompt, in order.

        Raises:
            UsageError: the prompt leaves no room for an answer, or has other places than `pictures` fill.
        """
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.context} with the answer; "
                f"shorten it, or ask for more with --context (this model: up to {self.config.context_length})"
            )
        places = self._places(prompt, pictures)
        shared = 0
        # The last is run again: its logits are needed.
        for ours, new in zip(self.seen, _meaning(prompt[:-1], places), strict=False):
            if ours != new:
                break
            shared += 1
        self.rewind(shared)
        self.n_reused = shared
        return self.append(prompt[shared:], on_progress, places[shared:])

    def _places(self, prompt: Sequence[int], pictures: Sequence[EncodedImage]) -> list[Place]:
        """Beside each token of the prompt, the picture and the row that it stands for."""
        rows = [(picture, row) for picture in pictures for row in range(picture.n_tokens)]
        n_places = sum(token == self.pad_id for token in prompt)
        if n_places != len(rows):
            raise UsageError(f"the prompt has {n_places} image places for {len(rows)} image tokens")
        waiting = iter(rows)
        return [next(waiting) if token == self.pad_id else None for token in prompt]

    def generate(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        on_progress: Progress | None = None,
        pictures: Sequence[EncodedImage] = (),
    ) -> Iterator[int]:
        """Tokens of the answer, without the stop token. Closing the iterator cancels between tokens.

        Afterwards `finish_reason` is "stop", "length" (max_tokens), "context" (no room left) or "cancelled".
        """
        self.finish_reason = "cancelled"
        sampler = Sampler(options, self.n_named)
        logits_V = self.prefill(prompt, on_progress, pictures)
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
        specials = self.vocab.specials.values()
        return max(specials, default=len(self.vocab.ranks) - 1) + 1


class Engine(BaseEngine):
    """A model on the CPU kernels."""

    def __init__(self, path: Path, *, context: int | None = None, threads: int | None = None) -> None:
        """Map `path` and reserve room for `context` tokens: by default the model's own limit, at most 32768.

        Raises:
            ModelFileError: the file is missing, damaged or another model's.
            UsageError: `context` is not positive or beyond the model's limit.
        """
        self.weights = open_weights(path)
        super().__init__(path, self.weights.config, self.weights.vocab, context)
        self.image_side = self.weights.image_side
        self.cache = LatentCache(self.config, self.context)
        kernels.set_threads(threads)

    def forward(self, ids: Sequence[int], places: Sequence[Place], on_layer: OnLayer) -> NDArray[np.float32]:
        return model.forward(self.weights, self.cache, np.asarray(ids, np.int32), _spliced(places), on_layer)

    def rewind(self, n: int) -> None:
        super().rewind(n)
        self.cache.rewind(n)


def _meaning(ids: Sequence[int], places: Sequence[Place]) -> list[object]:
    """What each token stands for, comparable between prompts."""
    return [
        token if place is None else (place[0].digest, place[1])
        for token, place in zip(ids, places, strict=False)
    ]


def _spliced(places: Sequence[Place]) -> Spliced | None:
    """The rows that pictures put into one step, or None without any."""
    at = [i for i, place in enumerate(places) if place is not None]
    if not at:
        return None
    return np.array(at), np.stack([place[0].rows_MD[place[1]] for place in places if place is not None])
