"""The chat template, as code: messages in, token ids out.

Each turn is `<|im_ROLE|>`, the role's name, `<|im_middle|>`, the content, `<|im_end|>`, without newlines and without a
begin token. A conversation that does not open with a system message gets the published one. The model opens its
thinking itself, so nothing is written for it. Model files carry this template as a Jinja program; it is compared
with the known ones, never run.

A picture stands as `<|media_start|>image<|media_content|><|media_pad|>…<|media_end|>`, one pad per image token.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kimi_lite.errors import UsageError
from kimi_lite.runtime.tokenizer import Tokenizer

IMAGE_PAD = "<|media_pad|>"  # stands once for each image token
DEFAULT_SYSTEM = "You are a helpful assistant"
ROLE_MARKS = {"system": "<|im_system|>", "user": "<|im_user|>", "assistant": "<|im_assistant|>"}


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture's place in a message: how many tokens its embedding rows take."""

    n_tokens: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text, or text and pictures in order."""

    role: str
    content: str | Sequence[str | ImagePart]


def render(messages: Iterable[Message], tokenizer: Tokenizer, *, open_answer: bool = True) -> list[int]:
    """Token ids of a conversation; `open_answer` adds the head of the assistant's next turn.

    Raises:
        UsageError: a role other than system, user or assistant.
    """
    messages = list(messages)
    if not messages or messages[0].role != "system":
        messages.insert(0, Message("system", DEFAULT_SYSTEM))
    ids: list[int] = []
    for message in messages:
        ids += _head(message.role, tokenizer)
        parts = [message.content] if isinstance(message.content, str) else message.content
        for part in parts:
            ids += tokenizer.encode(part) if isinstance(part, str) else _image(part, tokenizer)
        ids.append(tokenizer.special("<|im_end|>"))
    return ids + _head("assistant", tokenizer) if open_answer else ids


def _head(role: str, tokenizer: Tokenizer) -> list[int]:
    if role not in ROLE_MARKS:
        raise UsageError(f"a message has the role {role!r}; expected system, user or assistant")
    return [tokenizer.special(ROLE_MARKS[role]), *tokenizer.encode(role), tokenizer.special("<|im_middle|>")]


def _image(part: ImagePart, tokenizer: Tokenizer) -> list[int]:
    return [
        tokenizer.special("<|media_start|>"),
        *tokenizer.encode("image"),
        tokenizer.special("<|media_content|>"),
        *[tokenizer.special(IMAGE_PAD)] * part.n_tokens,
        tokenizer.special("<|media_end|>"),
    ]


def template_digest(text: str) -> str:
    """SHA-256 of a file's chat template, to tell whether it is one we know."""
    return hashlib.sha256(text.encode()).hexdigest()
