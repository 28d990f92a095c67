"""Conversations as files: what is saved comes back to the bit, and a file that is something else is one sentence."""

import base64
import io
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import command
from PIL import Image
from rewrite import without_image_side
from terminal import talk_in_a_terminal

import kimi_lite
from kimi_lite import chat_completions
from kimi_lite.chat import text_file
from kimi_lite.errors import UsageError
from kimi_lite.runtime.image import PATCH, is_canvas, plan
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.template import Message

NANO = Path(kimi_lite.__file__).parent / "nano" / "kimi-vl-nano-int4.gguf"


@pytest.fixture
def model() -> kimi_lite.Model:
    return kimi_lite.load(vram=0)


def said(model: kimi_lite.Model, text: str, *pictures: object) -> str:
    return "".join(event.text for event in model.chat(text, images=pictures) if event.kind == "answer")


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 2] = 255
    return Image.fromarray(pixels)


def test_a_conversation_goes_on_where_it_was_saved(model: kimi_lite.Model, tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    model.conversation.system = "Answer in one word – «briefly»."
    said(model, "What is 12 + 34?")
    said(model, "Who are you?")
    model.conversation.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    fresh = kimi_lite.load(vram=0)
    fresh.resume(path)
    assert fresh.conversation == model.conversation
    assert len(fresh.conversation.thinking) == 2
    question = 'Reverse "planet".'
    assert said(fresh, question) == said(model, question)
    fresh.conversation.save(path)  # over the other
    model.resume(path)
    assert model.conversation == fresh.conversation


# 1000 × 444 is shrunk and then padded beyond the limit of nano's 1024 patches, so its canvas as a picture would be shrunk again.
@pytest.mark.parametrize("size", [(45, 30), (84, 56), (1000, 444)])
def test_pictures_come_back_to_the_bit(
    model: kimi_lite.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", "off")
    assert model.encoder is not None
    wide, grid = plan((1000, 444), model.encoder.image)
    canvas = grid[1] * PATCH, grid[0] * PATCH
    assert plan(canvas, model.encoder.image)[0] != canvas != wide
    said(
        model,
        "What colour is it?",
        picture(*size),
        scene("red", "circle", 1, (3, 3), np.random.default_rng(1))[0],
    )
    model.conversation.save(tmp_path / "seen.json")
    fresh = kimi_lite.load(vram=0)
    fresh.resume(tmp_path / "seen.json")
    for ours, theirs in zip(parts(model), parts(fresh), strict=True):
        if isinstance(ours, str):
            assert ours == theirs
        else:
            assert ours.digest == theirs.digest
            assert np.array_equal(ours.rows_MD, theirs.rows_MD)
            assert np.array_equal(ours.pixels, theirs.pixels)
    assert said(fresh, "And what shape?") == said(model, "And what shape?")
    # The original again is the same picture: neither encoded nor, in the cache of the context, another one.
    assert model.encode([picture(*size)])[0].digest == parts(fresh)[0].digest


def parts(model: kimi_lite.Model) -> list[Any]:
    return list(model.conversation.messages[0].content)


def test_what_padding_made_is_known_for_it(model: kimi_lite.Model) -> None:
    assert model.encoder is not None
    rng = np.random.default_rng(3)
    for limit in (256, 1024, 4096):
        config = replace(model.encoder.image, token_limit=limit)
        for width, height in (2 ** rng.uniform(3, 12.7, (3000, 2))).astype(int).tolist():
            try:
                (rows, columns) = plan((width, height), config)[1]
            except UsageError:  # too long and narrow
                continue
            assert is_canvas((columns * PATCH, rows * PATCH), config), (width, height)
        for size in ((27, 28), (28, 29), (28 * 400, 28), (28 * 200, 28 * 200)):
            assert not is_canvas(size, config)


def test_the_messages_are_those_of_chat_completions(model: kimi_lite.Model, tmp_path: Path) -> None:
    model.conversation.system = "Be brief."
    said(model, "What colour is it?", picture(84, 56))
    model.conversation.save(tmp_path / "a.json")
    asked = chat_completions.read((tmp_path / "a.json").read_bytes())
    messages = chat_completions.conversation(asked.messages, model.encode, fetch=False)
    ours = model.conversation.prompt(Message("user", ""))[:-1]
    assert [message.role for message in messages] == [message.role for message in ours]
    assert "".join(map(str, messages[-1].content)) == ours[-1].content
    seen, text = list(messages[1].content)
    assert (text, getattr(seen, "digest", "")) == ("What colour is it?", parts(model)[0].digest)


def uri(data: bytes) -> dict[str, object]:
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
    }


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    picture(width, height).save(out, "PNG")
    return out.getvalue()


def held(*messages: object, schema: str = "kimi-lite/1") -> bytes:
    return json.dumps({"schema": schema, "messages": messages}).encode()


USER, REPLY = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD = {
    "empty": (b"", "it is no JSON"),
    "text": (b"hello", "it is no JSON"),
    "bytes": (b"\xff\xfe", "it is no JSON"),
    "deep": (b"[" * 100_000, "it is no JSON"),
    "a list": (b"[]", "it has no schema 'kimi-lite/1' with messages"),
    "an answer of ask": (b'{"schema": "kimi-lite/1", "answer": "x"}', "with messages"),
    "of another time": (held(USER, REPLY, schema="kimi-lite/2"), "it has no schema"),
    "no object": (held("x"), "message 1 is no object"),
    "begins with an answer": (held(REPLY), "message 1 has the role 'assistant', where 'user' is due"),
    "two questions": (held(USER, USER), "message 2 has the role 'user', where 'assistant' is due"),
    "system inside": (
        held(USER, REPLY, {"role": "system", "content": "z"}),
        "message 3 has the role 'system'",
    ),
    "no answer": (held(USER), "its last message has no answer"),
    "no text": (held({"role": "user"}, REPLY), "message 1 has no text"),
    "a number": (held(USER, {"role": "assistant", "content": 5}), "message 2 has no text"),
    "thinking of another kind": (held(USER, {**REPLY, "reasoning_content": 5}), "message 2 has no text"),
    "a path": (
        held(
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]}, REPLY
        ),
        "message 1 has a part that is neither a text nor a PNG",
    ),
    "a broken picture": (held({"role": "user", "content": [uri(png(28, 28)[:200])]}, REPLY), "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_another_kind_is_one_sentence(model: kimi_lite.Model, tmp_path: Path, name: str) -> None:
    data, text = BAD[name]
    path = tmp_path / "x.json"
    path.write_bytes(data)
    before = model.conversation
    with pytest.raises(UsageError) as error:
        model.resume(path)
    assert text in str(error.value)
    assert str(error.value).startswith(f"{path}: not a conversation that kimi-lite saved: ")
    assert model.conversation is before


def test_a_picture_from_elsewhere_is_seen_as_any_other(model: kimi_lite.Model, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(held({"role": "user", "content": [uri(png(100, 61))]}, REPLY))
    model.resume(path)
    assert parts(model)[0].digest == model.encode([picture(100, 61)])[0].digest
    without_image_side(NANO, tmp_path / "blind.gguf")
    blind = kimi_lite.load(tmp_path / "blind.gguf", vram=0)
    with pytest.raises(UsageError, match="has no image side"):
        blind.resume(path)


def test_what_cannot_be_written_or_read_is_one_sentence(model: kimi_lite.Model, tmp_path: Path) -> None:
    said(model, "Who are you?")
    for path, text in (
        (tmp_path / "no" / "a.json", f"the directory {tmp_path / 'no'} does not exist"),
        (tmp_path, "cannot be written"),
        (tmp_path / ("n" * 300), "cannot be written"),
    ):
        with pytest.raises(UsageError, match=text):
            model.conversation.save(path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob("writing-*"))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            model.resume(path)


def test_texts_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(" söme\ntext \n", encoding="utf-8")
    assert text_file(path) == "söme\ntext"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(UsageError, match="not UTF-8 text; pictures, PDFs and videos come with /image"):
        text_file(path)
    path.write_bytes(b"a" * ((2 << 20) + 1))
    with pytest.raises(UsageError, match="more than 2 MB"):
        text_file(path)
    with pytest.raises(UsageError, match="cannot be read"):
        text_file(tmp_path)


@pytest.mark.skipif(shutil.which("true") is None or os.name != "posix", reason="needs a pseudo-terminal")
def test_a_chat_is_saved_and_resumed(tmp_path: Path) -> None:
    path, notes = tmp_path / "a talk.json", tmp_path / "word.txt"
    notes.write_text('Reverse "planet".\n')
    keys = f"/save {path}\r".encode()
    screen, code = talk_in_a_terminal(
        (4, b"/save\r"),
        (0.5, keys),
        (0.5, f"/file {tmp_path}/none\r".encode()),
        (0.5, f"/file {notes}\r".encode()),
        (0.5, b"Letters\x1b\ronly.\r"),
        (2, keys),
        (0.5, b"Who are you?\r"),
        (2, b"/save\r"),
        (0.5, f"/save {notes}\r".encode()),
        (0.5, b"\x04"),
    )
    assert code == 0
    for text in ("/save needs a file", "nothing was said yet", "cannot be read", f"{notes} exists"):
        assert text in screen, text
    assert screen.count(f"(saved; go on with kimi-lite chat --resume '{path}')") == 2
    first, _, second, answer = json.loads(path.read_bytes())["messages"]
    assert first["content"] == 'Reverse "planet".\nLetters\nonly.'  # the file, then two lines that were typed
    assert second["content"] == "Who are you?"
    screen, code = talk_in_a_terminal(
        (4, b"/clear\r"),
        (0.5, b"/save\r"),
        (0.5, f"/load {path}\r".encode()),
        (0.5, b"\x04"),
        arguments=("--resume", str(path)),
    )
    assert code == 0
    assert screen.count("(2 questions and answers; the last were)") == 2
    assert screen.count(answer["content"]) == 2
    assert "/save needs a file" in screen  # what was forgotten came from no file
    screen, code = talk_in_a_terminal(arguments=("--resume", str(notes)))
    assert (code, screen.count("\n")) == (2, 2)  # which model it is, and the sentence
    assert "not a conversation that kimi-lite saved" in screen
    screen, code = talk_in_a_terminal(arguments=("--resume", str(path), "--system", "x"))
    assert code == 2
    assert "leave --system away" in screen
    assert command("chat", "--resume", str(path)).returncode == 2  # no terminal
