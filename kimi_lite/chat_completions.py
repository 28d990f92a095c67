"""OpenAI's chat completions, the format that most programs speak, as far as this model has what it asks for.

A request is read into a struct: msgspec checks every type and names the place of what is wrong. A field that would change the
answer and cannot be followed (tools, several answers at once) is refused; what has no meaning here (user, metadata) is
passed over. Ranges are checked where they matter, by the sampler and by the model.

Thinking travels as `reasoning_content`, beside `content`, as most programs that show it expect. Clients send it back or do
not; it is dropped from earlier turns, as the makers do. Pictures are data URIs, or URLs if the server was told to fetch them.
"""

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from kimi_lite.api import Event, TokenLogprob
from kimi_lite.errors import UsageError
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message
from kimi_lite.runtime.vision import EncodedImage

FINISH = {"stop": "stop", "length": "length", "context": "length"}  # our reasons, in the format's words


class ImageUrl(msgspec.Struct):
    url: str


class ImagePart(msgspec.Struct, tag="image_url", tag_field="type"):
    image_url: ImageUrl


class TextPart(msgspec.Struct, tag="text", tag_field="type"):
    text: str


class Turn(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class NamedSchema(msgspec.Struct):
    schema: dict[str, Any]


class AsText(msgspec.Struct, tag="text", tag_field="type"):
    pass


class AsJson(msgspec.Struct, tag="json_object", tag_field="type"):
    pass


class AsSchema(msgspec.Struct, tag="json_schema", tag_field="type"):
    json_schema: NamedSchema


class Asked(msgspec.Struct):
    """The fields that are understood; `thinking_budget`, `regex`, `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

    messages: list[Turn]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    thinking_budget: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    response_format: AsText | AsJson | AsSchema | None = None
    regex: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # What a request may only say no to.
    n: int | None = None
    frequency_penalty: float | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the answer must keep to, if it must."""
        if isinstance(self.response_format, AsSchema):
            return self.response_format.json_schema.schema
        return {"type": "object"} if isinstance(self.response_format, AsJson) else None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def options(self, default: SamplingOptions) -> SamplingOptions:
        """How tokens are drawn, with `default` where the request is silent. Raises UsageError outside the sampler's ranges."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "logit_bias",
        )
        return replace(default, **{n: v for n in names if (v := getattr(self, n)) is not None})


DECODER = msgspec.json.Decoder(Asked)


def read(body: bytes) -> Asked:
    """A request from its JSON.

    Raises:
        UsageError: it is not JSON, misses a field or has one of another type, or asks for what this model does not do.
    """
    try:
        asked = DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"the request cannot be read: {error}") from None
    except RecursionError:
        raise UsageError("the request cannot be read: its JSON is nested too deeply") from None
    if not asked.messages:
        raise UsageError("the request has no messages; give at least the question, as a message of the user")
    if asked.tools or asked.functions or any(turn.tool_calls for turn in asked.messages):
        raise UsageError("the request has tools; this model was not taught to call any, so leave them out")
    if asked.n not in (None, 1):
        raise UsageError(f"n is {asked.n}; one answer is given at a time, so ask again for another")
    if asked.frequency_penalty:
        raise UsageError(
            f"frequency_penalty is {asked.frequency_penalty}; of penalties there are presence_penalty and repetition_penalty"
        )
    return asked


def conversation(
    turns: Sequence[Turn], encode: Callable[[Sequence[object]], list[EncodedImage]], fetch: bool
) -> list[Message]:
    """The request's messages as the template takes them, pictures encoded.

    Raises:
        UsageError: a picture that cannot be read, or is named by a path, or by a URL without `fetch`.
    """
    messages = []
    for turn in turns:
        parts: list[str | EncodedImage] = []
        for part in [TextPart(turn.content)] if isinstance(turn.content, str) else turn.content or []:
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                parts += encode([_source(part.image_url.url, fetch)])
        messages.append(Message("system" if turn.role == "developer" else turn.role, parts))
    return messages


def _source(url: str, fetch: bool) -> str:
    """A picture's address, if it is one that may be opened on behalf of somebody else: never a path of this machine."""
    if url[:5].lower() == "data:" or (fetch and re.match(r"https?://", url, re.IGNORECASE)):
        return url
    fetching = ", or URLs of the web if the server runs with --fetch" if not fetch else ", or URLs of the web"
    raise UsageError(
        f"image_url is {url[:40]!r}; expected the picture itself as data:image/png;base64,…{fetching}"
    )


@dataclass
class Completion:
    """One answer on its way into the format: fed with events, it gives chunks of a stream, or at last the whole."""

    model: str
    asked: Asked
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    said: dict[str, list[str]] = field(default_factory=lambda: {"thinking": [], "answer": []})
    done: Event | None = None

    def opening(self) -> dict[str, Any]:
        """A stream's first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds to a stream."""
        self.add(event)
        if event.kind != "done":
            name = "reasoning_content" if event.kind == "thinking" else "content"
            yield self._chunk({name: event.text})
            return
        yield self._chunk({}, FINISH[str(event.reason)], self._logprobs())
        if self.asked.wants_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def add(self, event: Event) -> None:
        if event.kind == "done":
            self.done = event
        else:
            self.said[event.kind].append(event.text)

    def whole(self) -> dict[str, Any]:
        """The reply to a request without a stream, after the last event."""
        assert self.done is not None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self.said["answer"]),
            "refusal": None,
        }
        if self.said["thinking"]:
            message["reasoning_content"] = "".join(self.said["thinking"])
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(),
            "finish_reason": FINISH[str(self.done.reason)],
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, delta: dict[str, str], finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _usage(self) -> dict[str, Any]:
        assert self.done is not None
        assert self.done.stats is not None
        stats = self.done.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.tokens,
            "total_tokens": stats.prompt_tokens + stats.tokens,
            "prompt_tokens_details": {"cached_tokens": stats.reused},
            "completion_tokens_details": {"reasoning_tokens": stats.thinking_tokens},
        }

    def _logprobs(self) -> dict[str, Any] | None:
        """Those of the answer's tokens: what stood in front, thinking and marks, is not content."""
        if self.done is None or self.done.logprobs is None or self.done.stats is None:
            return None
        content = [
            {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
            for token in self.done.logprobs[self.done.stats.thinking_tokens :]
        ]
        return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.bytes.decode(errors="replace"),
        "bytes": list(token.bytes),
        "logprob": token.logprob,
    }
