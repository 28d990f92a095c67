"""The Python interface: load a model, ask it, talk with it.

    model = kimi_lite.load("model.gguf")
    for event in model.chat("What is 38 + 47?"):
        if event.kind == "answer":
            print(event.text, end="")

A `Model` holds one conversation at a time; `ask` is a question of its own. Events are plain data: "thinking" and
"answer" carry text as it comes, "done" closes with the reason and the statistics. Closing the iterator cancels: what
was said so far stays in the conversation.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from kimi_lite.errors import ModelFileError, UsageError
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message, render
from kimi_lite.text_stream import CLOSE, OPEN, TextStream

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

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first, over the time between the first and the last."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        return (self.prompt_tokens - self.reused) / self.prefill_s if self.prefill_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of output. The last event is "done", with `reason` and `stats`."""

    kind: Literal["thinking", "answer", "done"]
    text: str = ""
    reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply. `text` is empty if it was cut off inside its thinking."""

    text: str
    thinking: str
    reason: FinishReason
    stats: Stats


@dataclass
class Conversation:
    """Messages so far. Earlier thinking is kept here but, as the makers do, not sent back to the model."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)  # one for each assistant message

    def prompt(self, question: str) -> list[Message]:
        head = [Message("system", self.system)] if self.system is not None else []
        return [*head, *self.messages, Message("user", question)]


class Model:
    """An open model and its conversation. Not for two threads at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
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
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """Ask within the conversation, which keeps the question and whatever was answered.

        Args:
            thinking_budget: after this many tokens of thinking the chain is closed and the answer begins.
            stop: texts that end the answer, left out of it.
            on_progress: called with prompt tokens done and in all.

        Raises:
            UsageError: pictures (they are not read yet), an empty text, or a conversation that fills the context.
        """
        conversation = self.conversation
        said: dict[str, list[str]] = {"thinking": [], "answer": []}
        kept = False
        try:
            for event in self._run(
                conversation.prompt(_question(text, images)),
                options,
                max_tokens,
                thinking_budget,
                stop,
                on_progress,
            ):
                kept = True
                if event.kind != "done":
                    said[event.kind].append(event.text)
                yield event
        finally:
            if kept:
                conversation.messages += [
                    Message("user", text),
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
    ) -> Answer:
        """One question outside the conversation, answered whole. Raises what `chat` raises."""
        prompt = Conversation(system).prompt(_question(text, images))
        said: dict[str, list[str]] = {"thinking": [], "answer": []}
        for event in self._run(prompt, options, max_tokens, thinking_budget, stop, None):
            if event.kind == "done":
                assert event.reason is not None
                assert event.stats is not None
                return Answer("".join(said["answer"]), "".join(said["thinking"]), event.reason, event.stats)
            said[event.kind].append(event.text)
        raise AssertionError("an answer ended without its last event")

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

    def _run(
        self,
        messages: list[Message],
        options: SamplingOptions | None,
        max_tokens: int | None,
        thinking_budget: int | None,
        stop: Sequence[str],
        on_progress: Callable[[int, int], None] | None,
    ) -> Iterator[Event]:
        engine, options = self.engine, options or SamplingOptions()
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}; expected at least 1")
        if any(not s for s in stop):
            raise UsageError("a stop text is empty; it would end every answer at once")
        prompt = render(messages, engine.tokenizer)
        stream = TextStream(tuple(stop))
        started = time.perf_counter()
        first = None
        produced: list[int] = []
        n_prompt, n_reused = len(prompt), None
        reason: FinishReason = "cancelled"
        budget = thinking_budget
        while True:
            left = None if max_tokens is None else max_tokens - len(produced)
            tokens = engine.generate(prompt + produced, options, max_tokens=left, on_progress=on_progress)
            closed = False
            for token in tokens:
                first = first or time.perf_counter()
                n_reused = engine.n_reused if n_reused is None else n_reused
                produced.append(token)
                for kind, piece in stream.feed(engine.tokenizer.decode_bytes([token])):
                    yield Event(kind, piece)
                if stream.stopped:
                    break
                if budget is not None and stream.part == "thinking" and len(produced) >= budget:
                    closed, budget = True, None
                    break
            tokens.close()  # type: ignore[attr-defined]
            if not closed:
                break
            # Close the chain in good form and go on: the mark becomes part of what the model has said.
            mark = engine.tokenizer.encode(CLOSE)
            produced += mark
            for kind, piece in stream.feed(CLOSE.encode()):
                yield Event(kind, piece)
        reason = "stop" if stream.stopped else engine.finish_reason  # type: ignore[assignment]
        for kind, piece in stream.finish():
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
        )
        yield Event("done", reason=reason, stats=stats)


def load(path: str | Path | None = None, *, context: int | None = None, threads: int | None = None) -> Model:
    """Open a packed int4 or GGUF file; without a path, the small model that ships with kimi-lite.

    Raises:
        ModelFileError: the file is missing, damaged or another model's.
        UsageError: a context or a thread count that cannot be.
    """
    return Model(Engine(Path(path) if path is not None else nano_path(), context=context, threads=threads))


def nano_path() -> Path:
    """The shipped small model's file."""
    path = Path(str(files("kimi_lite") / "nano" / NANO))
    if not path.exists():
        raise ModelFileError(
            f"{path}: the small model is missing from this installation; install kimi-lite again"
        )
    return path


def _question(text: str, images: Sequence[object]) -> str:
    if images:
        raise UsageError("pictures are not read yet; ask without them")
    if not text.strip():
        raise UsageError("the question is empty")
    return text


__all__ = ["CLOSE", "OPEN", "Answer", "Conversation", "Event", "Model", "Stats", "load", "nano_path"]
