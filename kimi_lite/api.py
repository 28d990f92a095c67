"""The Python interface: load a model, ask it, talk with it.

    model = kimi_lite.load("model.gguf")
    for event in model.chat("What is 38 + 47?"):
        if event.kind == "answer":
            print(event.text, end="")

A `Model` holds one conversation at a time; `ask` is a question of its own. Events are plain data: "thinking" and
"answer" carry text as it comes, "done" closes with the reason and the statistics. Closing the iterator cancels: what
was said so far stays in the conversation.
"""

import json
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import mmproj_beside
from kimi_lite.images import MAX_PICTURES, Picture, load_pictures
from kimi_lite.runtime.engine import BaseEngine, Engine
from kimi_lite.runtime.image_cache import ImageCache, default_directory
from kimi_lite.runtime.placement import parse_size
from kimi_lite.runtime.sampling import Likelihood, SamplingOptions, likelihood
from kimi_lite.runtime.template import Message, render
from kimi_lite.runtime.vision import EncodedImage, ImageEncoder
from kimi_lite.saved import resume, save
from kimi_lite.text_stream import CLOSE, OPEN, TextStream

if TYPE_CHECKING:
    from PIL.Image import Image

    from kimi_lite.runtime.constraint import Constraint

MOST_LOGPROBS = 100  # alternatives beside a token
NANO = "kimi-vl-nano-int4.gguf"
FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one answer. `reused` prompt tokens were found in the cache and not computed again."""

    prompt_tokens: int
    reused: int
    tokens: int
    prefill_s: float
    decode_s: float
    context: int
    context_used: int
    image_tokens: int = 0  # of the pictures that came with this question
    encode_s: float = 0.0  # spent on them
    gpu_dense: str | None = (
        None  # the format in which bitsandbytes multiplied the dense weights on a card, if it did
    )
    guessed: int = 0  # tokens that were guessed from what repeats itself, and checked
    guessed_right: int = 0  # of them, those that the answer went on with: each saved a step
    thinking_tokens: int = (
        0  # of `tokens`, those of the thinking, its marks included where the model drew them
    )

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first, over the time between the first and the last."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        return (self.prompt_tokens - self.reused) / self.prefill_s if self.prefill_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a reply and its log-probability: what the model itself gave it, before temperature, filters and grammars.

    `top` lists the likeliest tokens at its place with theirs, the likeliest first. A token may be part of a character, so it is bytes.
    """

    id: int
    bytes: bytes
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of output. The last event is "done", with `reason`, `stats`, and `logprobs` if they were asked for."""

    kind: Literal["thinking", "answer", "done"]
    text: str = ""
    reason: FinishReason | None = None
    stats: Stats | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply. `text` is empty if it was cut off inside its thinking.

    `data` is the text read as JSON, if a schema was given and the reply is complete: of a pydantic model, an instance, unless
    the model's own checks refuse it. `logprobs` are those of all tokens that the model drew, thinking and marks included, if asked for.
    """

    text: str
    thinking: str
    reason: FinishReason
    stats: Stats
    data: Any = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass
class Conversation:
    """Messages so far. Earlier thinking is kept here but, as the makers do, not sent back to the model."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)  # one for each assistant message

    def prompt(self, question: Message) -> list[Message]:
        head = [Message("system", self.system)] if self.system is not None else []
        return [*head, *self.messages, question]

    def save(self, path: str | Path) -> None:
        """Write it to a file, in the place of another of that name, for `Model.resume`. Raises UsageError."""
        save(self, Path(path))


class Model:
    """An open model and its conversation. Not for two threads at once."""

    def __init__(
        self, engine: BaseEngine, encoder: ImageEncoder | None = None, *, offline: bool = False
    ) -> None:
        """Without an `encoder` the model answers text only; `offline` refuses pictures from the web."""
        self.engine, self.encoder, self.offline = engine, encoder, offline
        self.conversation = Conversation()

    def chat(
        self,
        text: str,
        *,
        images: Sequence[object] = (),
        options: SamplingOptions | None = None,
        max_tokens: int | None = None,
        thinking_budget: int | None = None,
        stop: Sequence[str] = (),
        schema: object = None,
        regex: str | None = None,
        logprobs: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_image_progress: Callable[[float], None] | None = None,
    ) -> Iterator[Event]:
        """Ask within the conversation, which keeps the question and whatever was answered.

        Args:
            images: pictures that stand before the text: paths, URLs, bytes, PIL pictures, pages of a PDF
                ("a.pdf#pages=2-4"), frames of a video ("a.mp4#frames=8").
            thinking_budget: after this many tokens of thinking the chain is closed and the answer begins.
            stop: texts that end the answer, left out of it.
            schema: the answer is JSON of this schema, a dict or its JSON text, or of this pydantic model. Thinking stays
                free, and an answer that a limit cuts off is a piece of JSON.
            regex: the answer matches this expression as a whole (Rust's syntax).
            logprobs: the last event lists every token with its log-probability, and beside it so many of the likeliest tokens.
            on_progress: called with prompt tokens done and in all.
            on_image_progress: called with the share of new pictures that is encoded.

        Raises:
            UsageError: a picture that cannot be read, an empty text, a conversation that fills the context, or a schema or
                expression that cannot be followed.
        """
        conversation, constraint = self.conversation, self._constraint(schema, regex)
        started = time.perf_counter()
        question = self._question(text, images, on_image_progress)
        encode_s = time.perf_counter() - started if images else 0.0
        said: dict[str, list[str]] = {"thinking": [], "answer": []}
        kept = False
        try:
            for event in self._run(
                conversation.prompt(question),
                options,
                max_tokens,
                thinking_budget,
                stop,
                on_progress,
                encode_s,
                constraint,
                logprobs,
            ):
                kept = True
                if event.kind != "done":
                    said[event.kind].append(event.text)
                yield event
        finally:
            if kept:
                conversation.messages += [
                    question,
                    Message("assistant", "".join(said["answer"])),
                ]
                conversation.thinking.append("".join(said["thinking"]))

    def ask(
        self,
        text: str,
        *,
        images: Sequence[object] = (),
        system: str | None = None,
        options: SamplingOptions | None = None,
        max_tokens: int | None = None,
        thinking_budget: int | None = None,
        stop: Sequence[str] = (),
        schema: object = None,
        regex: str | None = None,
        logprobs: int | None = None,
    ) -> Answer:
        """One question outside the conversation, answered whole. Raises what `chat` raises."""
        constraint = self._constraint(schema, regex)
        started = time.perf_counter()
        prompt = Conversation(system).prompt(self._question(text, images, None))
        encode_s = time.perf_counter() - started if images else 0.0
        said: dict[str, list[str]] = {"thinking": [], "answer": []}
        for event in self._run(
            prompt, options, max_tokens, thinking_budget, stop, None, encode_s, constraint, logprobs
        ):
            if event.kind == "done":
                assert event.reason is not None
                assert event.stats is not None
                answer = "".join(said["answer"])
                data = read_data(schema, answer, event.reason)
                thinking = "".join(said["thinking"])
                return Answer(answer, thinking, event.reason, event.stats, data, event.logprobs)
            said[event.kind].append(event.text)
        raise AssertionError("an answer ended without its last event")

    def reply(
        self,
        messages: Sequence[Message],
        *,
        options: SamplingOptions | None = None,
        max_tokens: int | None = None,
        thinking_budget: int | None = None,
        stop: Sequence[str] = (),
        schema: object = None,
        regex: str | None = None,
        logprobs: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """The next turn of a conversation that the caller keeps; the model's own stays as it is.

        Pictures stand in the messages as `encode` gives them. Earlier thinking does not belong there: the makers do not send it back.
        Raises what `chat` raises.
        """
        constraint = self._constraint(schema, regex)
        return self._run(
            messages, options, max_tokens, thinking_budget, stop, on_progress, 0.0, constraint, logprobs
        )

    async def achat(self, text: str, **arguments: object) -> AsyncIterator[Event]:
        """`chat` for asynchronous code: the model runs in a thread, events arrive as they come."""
        import asyncio

        events = self.chat(text, **arguments)  # type: ignore[arg-type]
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Forget the conversation but for its system message."""
        self.conversation = Conversation(self.conversation.system)

    def resume(self, path: str | Path) -> None:
        """Go on with a conversation that `Conversation.save` wrote, in the place of the present one. Raises UsageError."""
        self.conversation = resume(self, Path(path))

    def encode(
        self, images: Sequence[object], on_progress: Callable[[float], None] | None = None
    ) -> list[EncodedImage]:
        """Pictures as the model takes them, to be used in `images=` any number of times.

        Raises:
            UsageError: a picture that cannot be read, more of them than the context holds, or no image side.
        """
        if self.encoder is None:
            path = self.engine.path
            others = sorted(str(p) for p in path.parent.glob("*mmproj*.gguf"))
            give = f"--mmproj {others[0]}" if len(others) == 1 else "--mmproj FILE"
            raise UsageError(
                f"{path.name} has no image side inside, and {mmproj_beside(path)} is not there; name another file with "
                f"{give}, or quantize a Kimi-VL checkpoint, whose file holds both"
            )
        if isinstance(images, (str, bytes)):
            raise UsageError("images is a single text; give a list: images=[…]")
        places: list[EncodedImage | None] = []  # None where a new picture will stand
        encoded = iter(self.encoder.encode(self._opened(images, places), on_progress))
        return [place if place is not None else next(encoded) for place in places]

    def _opened(self, images: Sequence[object], places: list[EncodedImage | None]) -> "Iterator[Image]":
        """New pictures one by one, so that only one is there in full size; counted before they are encoded."""
        total = 0
        for source in images:
            loaded = (
                [source]
                if isinstance(source, EncodedImage)
                else load_pictures([source], offline=self.offline)
            )
            for picture in loaded:
                total += (
                    picture.n_tokens if isinstance(picture, EncodedImage) else self._image_tokens(picture)
                )
                places.append(picture if isinstance(picture, EncodedImage) else None)
                if len(places) > MAX_PICTURES:
                    raise UsageError(f"more than {MAX_PICTURES} pictures in one question; ask in parts")
                if total >= self.engine.context:
                    raise UsageError(
                        f"the pictures take {total} tokens or more, but the context holds {self.engine.context} with "
                        "the answer; ask for more with --context, or for less detail with --max-image-tokens"
                    )
                if isinstance(picture, Picture):
                    yield picture.image

    def _image_tokens(self, picture: Picture) -> int:
        """How many tokens a picture will take; says so where max_image_tokens costs detail."""
        assert self.encoder is not None
        size = picture.image.size
        try:
            n = self.encoder.n_tokens(size)
            if self.encoder.max_tokens is not None and n < (
                full := self.encoder.n_tokens(size, capped=False)
            ):
                text = f"{picture.name}: shrunk to {n} tokens, for which the model would have {full}"
                warnings.warn(text, KimiLiteWarning, stacklevel=2)
        except UsageError as error:
            raise UsageError(f"{picture.name}: {error}") from None
        return n

    def _constraint(self, schema: object, regex: str | None) -> "Constraint | None":
        if schema is None and regex is None:
            return None
        if schema is not None and regex is not None:
            raise UsageError(
                "a schema and a regular expression were given; an answer can keep to one of them"
            )
        from kimi_lite.runtime.constraint import Constraint

        return Constraint(
            self.engine.tokenizer, schema=None if schema is None else _json_schema(schema), regex=regex
        )

    def _question(
        self, text: str, images: Sequence[object], on_progress: Callable[[float], None] | None
    ) -> Message:
        if not text.strip():
            raise UsageError("the question is empty")
        return Message("user", (*self.encode(images, on_progress), text) if images else text)

    def _run(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None,
        max_tokens: int | None,
        thinking_budget: int | None,
        stop: Sequence[str],
        on_progress: Callable[[int, int], None] | None,
        encode_s: float,
        constraint: "Constraint | None",
        logprobs: int | None,
    ) -> Iterator[Event]:
        engine, options = self.engine, options or SamplingOptions()
        pictures = [part for message in messages for part in _pictures(message)]
        check_limits(max_tokens, thinking_budget)
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs is {logprobs}; expected 0 to {MOST_LOGPROBS}")
        if any(not s for s in stop):
            raise UsageError("a stop text is empty; it would end every answer at once")
        prompt = render(messages, engine.tokenizer)
        stream = TextStream(tuple(stop), keep_end=constraint is not None)
        started = time.perf_counter()
        first = None
        produced: list[int] = []
        n_prompt, n_reused = len(prompt), None
        guessed = guessed_right = thinking_tokens = 0
        drawn: list[Likelihood] = []

        def note(logits_V: NDArray[np.float32], token: int) -> None:
            drawn.append(likelihood(logits_V, token, logprobs or 0, engine.n_named))

        reason: FinishReason = "cancelled"
        budget = thinking_budget
        while True:
            left = None if max_tokens is None else max_tokens - len(produced)
            tokens = engine.generate(
                prompt + produced,
                options,
                max_tokens=left,
                on_progress=on_progress,
                pictures=pictures,
                constraint=constraint,
                on_draw=None if logprobs is None else note,
            )
            closed = False
            for token in tokens:
                first = first or time.perf_counter()
                n_reused = engine.n_reused if n_reused is None else n_reused
                produced.append(token)
                before = stream.part
                for kind, piece in stream.feed(engine.tokenizer.decode_bytes([token])):
                    yield Event(kind, piece)
                if "thinking" in (before, stream.part):
                    thinking_tokens = len(produced)
                if stream.stopped:
                    break
                if budget is not None and stream.part == "thinking" and len(produced) >= budget:
                    closed, budget = True, None
                    break
            tokens.close()  # type: ignore[attr-defined]
            guessed, guessed_right = guessed + engine.n_guessed, guessed_right + engine.n_right
            if not closed:
                break
            # Close the chain in good form and go on: the mark becomes part of what the model has said.
            mark = engine.tokenizer.encode(CLOSE)
            produced += mark
            if constraint:
                constraint.close_thinking()
            for kind, piece in stream.feed(CLOSE.encode()):
                yield Event(kind, piece)
        reason = "stop" if stream.stopped else engine.finish_reason  # type: ignore[assignment]
        for kind, piece in stream.finish(cut=reason in ("length", "context")):
            yield Event(kind, piece)
        now = time.perf_counter()
        first = first or now
        stats = Stats(
            n_prompt,
            n_reused or 0,
            len(produced),
            first - started,
            now - first,
            engine.context,
            len(engine.tokens),
            sum(picture.n_tokens for picture in _pictures(messages[-1])),
            encode_s,
            engine.gpu_dense,
            guessed,
            guessed_right,
            thinking_tokens,
        )
        found = None if logprobs is None else tuple(map(self._token_logprob, drawn))
        yield Event("done", reason=reason, stats=stats, logprobs=found)

    def _token_logprob(self, drawn: Likelihood) -> TokenLogprob:
        spelt = self.engine.tokenizer.decode_bytes
        top = tuple(TokenLogprob(token, spelt([token]), logprob) for token, logprob in drawn.top)
        return TokenLogprob(drawn.token, spelt([drawn.token]), drawn.logprob, top)


def load(
    path: str | Path | None = None,
    *,
    mmproj: str | Path | None = None,
    context: int | None = None,
    threads: int | None = None,
    vram: int | str | None = None,
    max_image_tokens: int | None = None,
    offline: bool = False,
    engine: str = "kimi-lite",
    gpu_layers: int | None = None,
    gpu_dense: str | None = None,
) -> Model:
    """Open a packed int4 or GGUF file; without a path, the small model that ships with kimi-lite.

    Args:
        mmproj: the file with the image side; by default `model-mmproj.gguf` beside `model.gguf`, or else what the
            packed file itself holds. Without any the model answers text only.
        vram: how much of a card's memory may be taken, in bytes or as "8G" or "800M"; 0 for the CPU alone. By default
            a card is used if one works.
        max_image_tokens: a picture becomes at most so many tokens: less detail, less time.
        offline: refuse pictures from the web.
        engine: "kimi-lite", or "llama.cpp" for standard GGUF files on any graphics card that llama.cpp drives.
        gpu_layers: for llama.cpp, how many layers go to the graphics card; by default all.
        gpu_dense: "nf4", "int8" or "bf16": bitsandbytes multiplies the dense weights on a card, in that format. Answers
            then differ a little from the CPU's. By default our own kernels multiply the file's own weights.

    Raises:
        ModelFileError: a file is missing, damaged or another model's.
        UsageError: a context, a thread count or a number of image tokens that cannot be; no card for `vram`; an engine
            that is missing.
        DoesNotFitError: what is loaded or reserved exceeds the memory that is free, on a card or beside it.
    """
    if path is None and engine == "llama.cpp":
        raise UsageError("--engine llama.cpp needs a standard GGUF file; name one: the small model is packed")
    path = Path(path) if path is not None else nano_path()
    vram = parse_size(vram) if isinstance(vram, str) else vram
    runs = _open_engine(engine, path, context, threads, vram, gpu_layers, gpu_dense)
    beside = mmproj_beside(path)
    found = Path(mmproj) if mmproj is not None else beside if beside.exists() else runs.image_side
    encoder = None
    if found is not None:
        cache = ImageCache(default_directory())
        encoder = ImageEncoder(found, runs.config.hidden_size, cache, max_image_tokens, runs.encode)
    return Model(runs, encoder, offline=offline)


def _open_engine(
    name: str,
    path: Path,
    context: int | None,
    threads: int | None,
    vram: int | None,
    gpu_layers: int | None,
    gpu_dense: str | None,
) -> BaseEngine:
    if name == "llama.cpp":
        if vram is not None:
            raise UsageError("--vram is for kimi-lite's own engine; llama.cpp takes --gpu-layers")
        if gpu_dense is not None:
            raise UsageError("--gpu-dense is for kimi-lite's own engine; llama.cpp runs the file as it is")
        from kimi_lite.runtime.llama_engine import LlamaEngine

        return LlamaEngine(path, context=context, threads=threads, gpu_layers=gpu_layers)
    if name != "kimi-lite":
        raise UsageError(f"the engine is {name!r}; expected kimi-lite or llama.cpp")
    if gpu_layers is not None:
        raise UsageError("--gpu-layers is for --engine llama.cpp; give both, or neither")
    return Engine(path, context=context, threads=threads, vram=vram, gpu_dense=gpu_dense)


def check_limits(max_tokens: int | None, thinking_budget: int | None) -> None:
    """Raises UsageError for limits of an answer that cannot be kept to."""
    for name, value, least in (("max_tokens", max_tokens, 1), ("thinking_budget", thinking_budget, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}; expected at least {least}")


def read_data(schema: object, text: str, reason: FinishReason | None) -> Any:
    """The answer as data: None without a schema, or where a limit or a stop text cut it off."""
    if schema is None or reason != "stop":
        return None
    try:
        return (
            schema.model_validate_json(text) if hasattr(schema, "model_validate_json") else json.loads(text)
        )
    except ValueError:  # a stop text within it, or what a pydantic model checks beyond its schema
        return None


def _json_schema(schema: object) -> Mapping[str, Any]:
    """A dict, the text of one, or what a pydantic model says of itself."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise UsageError(
            f"the schema is {str(schema)[:80]!r}; expected a JSON object, a dict or a pydantic model"
        )
    return schema


def nano_path() -> Path:
    """The shipped small model's file."""
    path = Path(str(files("kimi_lite") / "nano" / NANO))
    if not path.exists():
        raise ModelFileError(
            f"{path}: the small model is missing from this installation; install kimi-lite again"
        )
    return path


def _pictures(message: Message) -> list[EncodedImage]:
    if isinstance(message.content, str):
        return []
    return [part for part in message.content if isinstance(part, EncodedImage)]


__all__ = [
    "CLOSE",
    "OPEN",
    "Answer",
    "Conversation",
    "Event",
    "Model",
    "Stats",
    "load",
    "mmproj_beside",
    "nano_path",
]
