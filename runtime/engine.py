"""Prefill and decode: a model file, its cache, and an iterator of tokens.

The engine keeps the tokens that its cache stands for. A new prompt reuses the longest prefix they share, so a second
turn of a chat computes only what is new; the result is bit for bit what it would be from scratch. All image tokens
have one id, so they are told apart by their picture's digest.

`BaseEngine` is that loop, whoever runs the model: `Engine` on the kernels of this package, `LlamaEngine`
(llama_engine.py) on llama.cpp.

Where `Engine` runs, on the CPU or over a card, changes no bit, so a card that fails in the middle of an answer costs time
only: the cache is computed again on the CPU from the tokens that it stood for, and the answer goes on. With `gpu_dense` it
goes on with the file's own weights, which the warning says.
"""

import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from numpy.typing import NDArray

from kimi_lite.errors import KimiLiteWarning, UsageError
from kimi_lite.formats.config import TextConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime import image_cache, kernels, vision
from kimi_lite.runtime.cuda.device import DeviceLostError, DeviceMemoryError, DeviceWrongError
from kimi_lite.runtime.hybrid import HybridModel, place
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.lookup import STEPS, PromptLookup
from kimi_lite.runtime.model import CpuModel, OnLayer, Spliced
from kimi_lite.runtime.prefix_cache import PrefixCache
from kimi_lite.runtime.prompt_cache import PromptCache, shared
from kimi_lite.runtime.sampling import Sampler, SamplingOptions
from kimi_lite.runtime.template import IMAGE_PAD
from kimi_lite.runtime.tensors import of_image_side
from kimi_lite.runtime.tokenizer import Tokenizer
from kimi_lite.runtime.usage import default_directory, save_usage
from kimi_lite.runtime.vision import EncodedImage, Place, VisionWeights
from kimi_lite.runtime.weights import open_weights

if TYPE_CHECKING:  # llguidance is imported for those answers that are constrained
    from kimi_lite.runtime.constraint import Constraint

DEFAULT_CONTEXT = 32768

Progress = Callable[[int, int], None]  # prompt tokens done, in all


class BaseEngine(ABC):
    """One open model. Not for two threads at once."""

    placement = ""  # where the model runs, for people
    gpu_dense: str | None = (
        None  # the format in which bitsandbytes multiplies dense weights on a card, if it does
    )
    image_side: GgufFile | None = None  # the model's file, if it holds the image side too

    def __init__(self, path: Path, config: TextConfig, vocab: Vocab, context: int | None) -> None:
        self.path, self.config, self.vocab = path, config, vocab
        self.context = choose_context(config, path, context)
        self.tokenizer = Tokenizer(vocab)
        self.stop_ids = self.tokenizer.stop_ids
        self.tokens: list[int] = []  # those that the cache holds
        self.places: list[Place] = []  # beside each, what an image token stands for
        self.pad_id = vocab.specials.get(IMAGE_PAD, -1)
        self.finish_reason = ""
        self.n_reused = 0  # prompt tokens that the last prefill found in the cache
        self.n_guessed = self.n_right = 0  # tokens that the last answer was guessed to go on with, and did

    @property
    def seen(self) -> list[object]:
        """What each cached token stands for: its id, or picture and row."""
        return _meaning(self.tokens, self.places)

    @abstractmethod
    def forward(self, ids: Sequence[int], places: Sequence[Place], on_layer: OnLayer) -> NDArray[np.float32]:
        """One step of as many tokens as `step` says, after the cached ones; the logits [V] that follow the last."""

    @abstractmethod
    def step(self, n_left: int) -> int:
        """Tokens of the next step, of so many that are left."""

    def encode(
        self,
        tower: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: vision.Progress | None = None,
    ) -> list[Float]:
        """Embedding rows [M, D] of pictures, as `vision.encode` gives them."""
        return vision.encode(tower, canvases, on_progress)

    def look_up(self, room: int) -> PromptLookup | None:
        """What guesses an answer of so many tokens after the cached ones; None where `check` takes no guesses."""
        return None

    def check(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """One step of a token and guesses behind it, after the cached ones; the logits [T, V] that follow each."""
        return self.append(ids)[None]

    def recall(self, prompt: Sequence[int], places: Sequence[Place]) -> int:
        """Make the cache hold as much of the prompt's beginning as is known, and nothing else; how many tokens it holds then."""
        n = shared(self.seen, _meaning(prompt, places))
        self.rewind(n)
        return n

    def answered(self) -> None:  # noqa: B027
        """An answer has ended, however it did."""

    def rewind(self, n: int) -> None:
        """Keep the first n cached tokens."""
        del self.tokens[n:], self.places[n:]

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
        logits_V, start = np.empty(0, np.float32), 0
        while start < len(ids):
            end = start + self.step(len(ids) - start)
            chunk, places = ids[start:end], pictures[start:end]

            def on_layer(n: int, start: int = start, n_tokens: int = len(chunk)) -> None:
                if on_progress:  # a pass takes seconds, so its layers count
                    on_progress(start + n * n_tokens // self.config.n_layers, len(ids))

            logits_V = self.forward(chunk, places, on_layer)
            self.tokens += chunk
            self.places += places
            start = end
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
        n = self.n_reused = self.recall(
            prompt[:-1], places[:-1]
        )  # the last is run again: its logits are needed
        return self.append(prompt[n:], on_progress, places[n:])

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
        constraint: "Constraint | None" = None,
        on_draw: Callable[[NDArray[np.float32], int], None] | None = None,
    ) -> Iterator[int]:
        """Tokens of the answer, without the stop token. Closing the iterator cancels between tokens.

        `constraint` says what may come next, and hears what came; `on_draw` hears the logits [V] and the token drawn from them. Afterwards `finish_reason` is "stop", "length" (max_tokens), "context" (no room left) or "cancelled".

        Where tokens are guessed (lookup.py), a step leaves logits for several; each is drawn when it is asked for, and only if
        all guesses in front of it were right, so an answer is what it would be without them.
        """
        self.finish_reason, self.n_guessed, self.n_right = "cancelled", 0, 0
        known, guesses = 0, list[int]()  # tokens that the cache holds for good, and those behind them
        try:
            sampler = Sampler(options, self.n_named)
            rows_KV = self.prefill(prompt, on_progress, pictures)[None]
            known = len(self.tokens)
            left, at_last = self.context - known, "context"
            if max_tokens is not None and max_tokens <= left:
                left, at_last = max_tokens, "length"
            lookup = self.look_up(left)
            while True:
                for logits_V, guess in zip(rows_KV, [*guesses, None], strict=True):
                    so_far = self.tokens[:known] if guesses else self.tokens
                    token = sampler.draw(logits_V, so_far, constraint.allowed() if constraint else None)
                    if token in self.stop_ids:
                        self.finish_reason = "stop"
                        return
                    if constraint:
                        constraint.accept(token)
                    if on_draw:
                        on_draw(logits_V, token)
                    yield token
                    left -= 1
                    if constraint and constraint.complete:
                        self.finish_reason = "stop"
                        return
                    if left <= 0:
                        self.finish_reason = at_last
                        return
                    if lookup:
                        lookup.add(token)
                    if token != guess:
                        break
                    known += 1
                    self.n_right += 1
                if lookup and guesses:
                    lookup.checked(len(guesses), known - len(self.tokens) + len(guesses))
                    self.rewind(known)
                guesses = lookup.guess(left - 1) if lookup else []
                started = time.perf_counter()
                rows_KV = self.check([token, *guesses])
                if lookup:
                    lookup.took(len(rows_KV), time.perf_counter() - started)
                known += 1
                self.n_guessed += len(guesses)
        finally:
            if guesses:
                self.rewind(known)
            self.answered()

    @property
    def n_named(self) -> int:
        """Ids from here on are padding rows that mean nothing."""
        specials = self.vocab.specials.values()
        return max(specials, default=len(self.vocab.ranks) - 1) + 1


class Engine(BaseEngine):
    """A model on the kernels of this package: on the CPU, or over a card as far as it fits."""

    def __init__(
        self,
        path: Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        vram: int | None = 0,
        prove: bool = True,
        gpu_dense: str | None = None,
    ) -> None:
        """Map `path` and reserve room for `context` tokens: by default the model's own limit, at most 32768.

        Args:
            vram: bytes of a card's memory that may be taken; 0 for the CPU alone, None for a card if one works.
            prove: run a few tokens on card and CPU first, and use no card that differs.
            gpu_dense: "nf4", "int8" or "bf16": bitsandbytes multiplies the dense weights on the card, in that format.

        Raises:
            ModelFileError: the file is missing, damaged or another model's.
            UsageError: `context` is not positive or beyond the model's limit, or `vram` or `gpu_dense` needs a card, or
                `gpu_dense` a package, and there is none.
            DoesNotFitError: the card's memory, or `vram`, is too small.
        """
        self.weights = open_weights(path)
        super().__init__(path, self.weights.config, self.weights.vocab, context)
        self.image_side = self.weights.image_side
        kernels.set_threads(threads)
        self.model: CpuModel | HybridModel = place(self.weights, self.context, vram, prove, gpu_dense)
        self.guessing = True  # an answer is the same without; see lookup.py
        mapped = self.weights.packed_bytes == 0 and isinstance(self.model, CpuModel)
        if mapped and psutil.virtual_memory().available > self.weights.n_bytes:
            self.weights.file.bring_in(lambda name: not of_image_side(name))
        self.prefixes = PrefixCache(self.weights.file.map, image_cache.default_directory())
        self.prompts: PromptCache | None = None  # who holds several conversations gives one
        self._prove = prove
        self._tower_off_card = False  # what the card gave was wrong, or it has no kernels
        self._said_no_room = False

    @property
    def placement(self) -> str:  # type: ignore[override]
        return self.model.placement

    @property
    def gpu_dense(self) -> str | None:  # type: ignore[override]
        return self.model.gpu_dense if isinstance(self.model, HybridModel) else None

    def step(self, n_left: int) -> int:
        return self.model.step(n_left)

    def encode(
        self,
        tower: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: vision.Progress | None = None,
    ) -> list[Float]:
        """On the card, if there is one and it has room; else on the CPU, to the same bits."""
        if isinstance(self.model, HybridModel) and not self._tower_off_card:
            try:
                return self.model.encode(tower, canvases, on_progress, self._prove)
            except DeviceLostError as error:
                self._leave_card(error)
            except DeviceMemoryError as error:
                if not self._said_no_room:  # the next picture may be smaller
                    warnings.warn(
                        f"{error}; the CPU encodes what does not fit", KimiLiteWarning, stacklevel=3
                    )
                self._said_no_room = True
            except (DeviceWrongError, UsageError) as error:
                self._tower_off_card = True
                warnings.warn(f"{error}; the CPU encodes pictures", KimiLiteWarning, stacklevel=3)
        return vision.encode(tower, canvases, on_progress)

    def look_up(self, room: int) -> PromptLookup | None:
        """On the CPU alone: a card's step gives logits for its last token only."""
        if not self.guessing or not isinstance(self.model, CpuModel):
            return None
        one = self.weights.step_bytes(1)
        costs = {n: self.weights.step_bytes(n) / one for n in STEPS}
        return PromptLookup(self.tokens, room, len(self.vocab.ranks), costs)

    def check(self, ids: Sequence[int]) -> NDArray[np.float32]:
        if len(ids) == 1:  # the model may have no other way
            return super().check(ids)
        assert isinstance(self.model, CpuModel)
        logits_TV = self.model.check(np.asarray(ids, np.int32))
        self.tokens += ids
        self.places += [None] * len(ids)
        return logits_TV

    def recall(self, prompt: Sequence[int], places: Sequence[Place]) -> int:
        """Also what was put aside, and pictures that were read before, on the CPU alone: a card reads them as fast as a disk would."""
        if not isinstance(self.model, CpuModel):
            return super().recall(prompt, places)
        if self.prompts:
            seen = self.seen
            self.tokens.clear()  # should this be interrupted, nothing is known
            n = self.prompts.exchange(seen, _meaning(prompt, places), self.model.cache)
        else:
            n = super().recall(prompt, places)
        for span in self.prefixes.spans(prompt, places):
            if span.end > n:
                if not self.prefixes.restore(span, self.model.cache):
                    break
                n = span.end
        self.tokens[:], self.places[:] = prompt[:n], places[:n]
        return n

    def answered(self) -> None:
        """Pictures that the answer read are kept, and which experts it used is remembered for the next plan."""
        if isinstance(self.model, CpuModel) and not sys.is_finalizing():
            for span in self.prefixes.spans(self.tokens, self.places):
                self.prefixes.keep(span, self.model.cache)
        save_usage(self.weights, default_directory())

    def forward(self, ids: Sequence[int], places: Sequence[Place], on_layer: OnLayer) -> NDArray[np.float32]:
        """One step; on the CPU from here on, if the card fails."""
        try:
            return self.model.forward(np.asarray(ids, np.int32), _spliced(places), on_layer)
        except (DeviceLostError, DeviceMemoryError) as error:
            self._leave_card(error)
        return self.model.forward(np.asarray(ids, np.int32), _spliced(places), on_layer)

    def rewind(self, n: int) -> None:
        super().rewind(n)
        try:
            self.model.rewind(n)
        except (DeviceLostError, DeviceMemoryError) as error:
            self._leave_card(error)

    def _leave_card(self, error: DeviceLostError | DeviceMemoryError) -> None:
        """Compute the cache again on the CPU, and stay there."""
        again = f" and reads {len(self.tokens)} tokens again" if self.tokens else ""
        other = f", with the file's own dense weights in place of {self.gpu_dense}" if self.gpu_dense else ""
        warnings.warn(f"{error}; the CPU goes on{again}{other}", KimiLiteWarning, stacklevel=4)
        cpu = CpuModel(self.weights, self.context, expanded=False)  # the card's bits
        start = 0
        while start < len(self.tokens):
            end = start + cpu.step(len(self.tokens) - start)
            ids, places = self.tokens[start:end], self.places[start:end]
            cpu.forward(np.asarray(ids, np.int32), _spliced(places))
            start = end
        assert isinstance(self.model, HybridModel)
        self.model.close()
        self.model = cpu  # only now, so that Ctrl-C meanwhile leaves no half-filled cache


def choose_context(config: TextConfig, path: Path, context: int | None) -> int:
    """Tokens to reserve room for. Raises UsageError for a number that the model does not allow."""
    limit = config.context_length
    if context is not None and not 1 <= context <= limit:
        raise UsageError(f"a context of {context} tokens was asked for; {path.name} allows 1 to {limit}")
    return context or min(limit, DEFAULT_CONTEXT)


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
