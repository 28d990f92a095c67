"""A conversation as a file: what was said, thought and shown, to go on with another day.

    /save trip.json in a chat, and later kimi-lite chat --resume trip.json

It is JSON, whose `messages` have the form of chat completions, so other programs can read them and a server can be sent them.
A picture lies in it as the model saw it, shrunk and padded, in a PNG that loses nothing; so after resuming it is the same picture to
the bit, and what the caches still know of it is neither encoded nor read again.
"""

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_lite.errors import UsageError
from kimi_lite.images import load_pictures
from kimi_lite.runtime.directories import written
from kimi_lite.runtime.image import is_canvas
from kimi_lite.runtime.template import ImagePart, Message
from kimi_lite.runtime.vision import EncodedImage

if TYPE_CHECKING:
    from kimi_lite.api import Conversation, Model

SCHEMA = "kimi-lite/1"
PNG = "data:image/png;base64,"


def save(conversation: "Conversation", path: Path) -> None:
    """Write a conversation, for its owner's eyes only; the file is complete or not there.

    Raises UsageError where it cannot be written.
    """
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    thinking = iter(conversation.thinking)
    for message in conversation.messages:
        parts = message.content if isinstance(message.content, str) else list(map(_part, message.content))
        messages.append({"role": message.role, "content": parts})
        if message.role == "assistant":
            messages[-1]["reasoning_content"] = next(thinking, "")
    text = json.dumps({"schema": SCHEMA, "messages": messages}, ensure_ascii=False, indent=1)
    try:
        if not path.absolute().parent.is_dir():
            raise UsageError(
                f"{path}: the directory {path.parent} does not exist; make it, or give another path"
            )
        with written(path) as file:
            file.write(text.encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be written ({reason}); give another path") from None


def _part(part: str | ImagePart) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    assert isinstance(part, EncodedImage)
    assert part.pixels is not None, "a picture without its pixels"
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(part.pixels).save(png, "PNG")
    return {"type": "image_url", "image_url": {"url": PNG + base64.b64encode(png.getvalue()).decode()}}


def resume(model: "Model", path: Path) -> "Conversation":
    """The conversation in a file, its pictures encoded by `model`, or found in its caches.

    Raises:
        UsageError: the file cannot be read or holds no conversation, or has pictures and the model no image side.
    """
    from kimi_lite.api import Conversation

    try:
        held = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _other(path, "it is no JSON") from None
    if (
        not isinstance(held, dict)
        or held.get("schema") != SCHEMA
        or not isinstance(held.get("messages"), list)
    ):
        raise _other(path, f"it has no schema {SCHEMA!r} with messages")
    conversation, turns = Conversation(), held["messages"]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise _other(path, f"message {number} is no object")
        role, content, thought = turn.get("role"), turn.get("content"), turn.get("reasoning_content", "")
        if number == 1 and role == "system" and isinstance(content, str):
            conversation.system = content
            continue
        due = "assistant" if len(conversation.messages) % 2 else "user"
        if role != due:
            raise _other(path, f"message {number} has the role {str(role)[:40]!r}, where {due!r} is due")
        where = f"message {number}"
        if due == "assistant" and isinstance(content, str) and isinstance(thought, str):
            conversation.thinking.append(thought)
        elif due == "user" and isinstance(content, list):
            content = [_opened(model, path, where, part) for part in content]
        elif due == "assistant" or not isinstance(content, str):
            raise _other(path, f"{where} has no text")
        conversation.messages.append(Message(due, content))
    if len(conversation.messages) % 2:
        raise _other(path, "its last message has no answer")
    return conversation


def _opened(model: "Model", path: Path, where: str, part: Any) -> str | EncodedImage:
    """A part of a message: a text, or a picture that the model has seen."""
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith(PNG):
            try:
                (picture,) = load_pictures([url])
            except UsageError as error:
                raise _other(path, f"the picture in {where} is damaged: {error}") from None
            if model.encoder is not None and is_canvas(picture.image.size, model.encoder.image):
                return model.encoder.encode([np.asarray(picture.image)])[0]
            return model.encode([picture])[0]
    raise _other(path, f"{where} has a part that is neither a text nor a PNG")


def _other(path: Path, found: str) -> UsageError:
    return UsageError(f"{path}: not a conversation that kimi-lite saved: {found}")
