"""Pictures through every entrance, from a file on disk to nano's answer, as a person asks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rewrite import without_image_side
from terminal import talk_in_a_terminal

import kimi_lite
from kimi_lite.api import mmproj_beside
from kimi_lite.chat import dropped_files, unquoted
from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.pictures import scene

# Of the held-out words and numbers, exactly, through the int4 file: what is wanted of nano.
READS_AT_LEAST = 0.88
N_READ = 200
ROOT = Path(__file__).parents[2]
NANO = ROOT / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
COLOUR = "What colour is it?"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIMI_LITE_IMAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """One disc each."""
    out = {}
    for seed, colour in enumerate(("red", "blue", "green")):
        out[colour] = tmp_path / f"{colour}.png"
        disc(colour, seed).save(out[colour])
    return out


def disc(colour: str, seed: int) -> Image.Image:
    return scene(colour, "circle", 1, (3, 3), np.random.default_rng(seed))[0]


def command(*arguments: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_lite", *map(str, arguments)],
        input=data,
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_ask_sees_a_file_standard_input_and_a_data_uri(pictures: dict[str, Path]) -> None:
    import base64

    data = pictures["blue"].read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source, piped in ((pictures["blue"], b""), ("-", data), (uri, b"")):
        done = command("ask", "-q", "--image", source, COLOUR, data=piped)
        assert (done.stdout, done.returncode) == (b"blue\n", 0), done.stderr


def test_a_picture_and_piped_text_come_together(pictures: dict[str, Path]) -> None:
    assert command("ask", "-q", "--image", pictures["red"], data=COLOUR.encode()).stdout == b"red\n"


def test_ask_tells_what_a_picture_cost(pictures: dict[str, Path]) -> None:
    assert b"9 image tokens in" in command("ask", "--image", pictures["red"], COLOUR).stderr


def test_a_second_process_encodes_and_reads_nothing_again(pictures: dict[str, Path], own_cache: Path) -> None:
    first = command("ask", "--image", pictures["red"], COLOUR)
    written = {entry.name: entry.stat().st_ino for entry in own_cache.iterdir()}
    assert sorted(name.partition(".")[2] for name in written) == ["latents", "rows"]
    second = command("ask", "--image", pictures["red"], "What shape is it?")
    assert (first.stdout, second.stdout) == (b"red\n", b"circle\n")
    assert b"(0 reused" in first.stderr
    found = re.search(rb"\((\d+) reused", second.stderr)
    assert found is not None
    assert int(found[1]) > 9  # the picture's tokens, and those in front of it
    assert {entry.name: entry.stat().st_ino for entry in own_cache.iterdir()} == written
    model = kimi_lite.load()
    model.ask(COLOUR, images=[pictures["red"]])
    assert model.encoder is not None
    assert model.encoder.n_encoded == 0


def test_each_picture_of_a_prompt_keeps_its_place(pictures: dict[str, Path]) -> None:
    model = kimi_lite.load()
    red, blue = model.encode([pictures["red"], pictures["blue"]])
    done = command("ask", "-q", "--image", pictures["red"], "--image", pictures["blue"], COLOUR)
    assert done.stdout.decode().strip() == model.ask(COLOUR, images=[red, blue]).text
    for images in ([red, blue], [blue, red], [red, red], [blue, red, blue]):
        model.ask(COLOUR, images=images)
        places = [m for m in model.engine.seen if isinstance(m, tuple)]
        assert places == [(i.digest, row) for i in images for row in range(i.n_tokens)]


def test_two_pictures_in_one_prompt_are_told_apart() -> None:
    """Asked for the colour in the first or the second of two discs, nano names the right one of the two."""
    model, colours = kimi_lite.load(), ("red", "blue", "green", "yellow", "purple", "orange")
    seen = {colour: model.encode([disc(colour, i)])[0] for i, colour in enumerate(colours)}
    right = []
    for first, second in ((a, b) for a in colours for b in colours if a != b):
        for which, colour in (("First", first), ("Second", second)):
            asked = model.ask(f"{which} picture: {COLOUR}", images=[seen[first], seen[second]])
            right.append(asked.text.strip() == colour)
    assert sum(right) / len(right) >= 0.95  # 60 of 60 when this was set


def test_a_conversation_keeps_its_pictures(pictures: dict[str, Path]) -> None:
    model = kimi_lite.load()

    def said(text: str, *images: object) -> tuple[str, kimi_lite.Stats]:
        events = list(model.chat(text, images=images))
        assert events[-1].stats is not None
        return "".join(e.text for e in events if e.kind == "answer"), events[-1].stats

    answer, stats = said(COLOUR, pictures["green"])
    assert (answer, stats.image_tokens) == ("green", 9)
    answer, stats = said("What shape is it?")
    assert stats.image_tokens == 0
    assert stats.reused > 9  # the picture is not computed again
    events = list(model.chat(COLOUR, images=[pictures["red"]]))
    assert "".join(e.text for e in events if e.kind == "answer") == "red"
    second = [e.text for e in events]
    fresh = kimi_lite.load()
    fresh.conversation.messages = model.conversation.messages[:4]
    assert [e.text for e in fresh.chat(COLOUR, images=[pictures["red"]])] == second


def test_the_same_answer_from_a_path_bytes_and_a_pil_picture(pictures: dict[str, Path]) -> None:
    model = kimi_lite.load()
    for source in (pictures["green"], pictures["green"].read_bytes(), Image.open(pictures["green"])):
        assert model.ask(COLOUR, images=[source]).text == "green"


def test_json_holds_the_answer(pictures: dict[str, Path]) -> None:
    reply = json.loads(command("ask", "-q", "--json", "--image", pictures["red"], COLOUR).stdout)
    assert reply["answer"] == "red"
    assert reply["prompt_tokens"] > 9


def test_a_cap_on_tokens_is_kept_and_said(tmp_path: Path) -> None:
    Image.effect_noise((280, 280), 50).save(tmp_path / "large.png")
    done = command(
        "ask", "--max-tokens", 4, "--max-image-tokens", 25, "--image", tmp_path / "large.png", COLOUR
    )
    assert b"25 image tokens" in done.stderr
    assert b"shrunk to 25 tokens, for which the model would have 100" in done.stderr
    model = kimi_lite.load(max_image_tokens=25)
    with pytest.warns(KimiLiteWarning, match="shrunk to 25 tokens"):
        model.ask(COLOUR, images=[tmp_path / "large.png"], max_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--image", "/nowhere.png", "x"], 2, "/nowhere.png: not found"),
        (["--image", "/", "x"], 2, "/: a directory"),
        (["--image", str(Path(__file__)), "x"], 2, "not a picture"),
        (["--image", "http://127.0.0.1/x.png", "x"], 2, "private address"),
        (["--offline", "--image", "http://example.org/x.png", "x"], 2, "--offline is set"),
        (["--image", "-", "--image", "-", "x"], 2, "given twice"),
        (["--max-image-tokens", "0", "x"], 2, "0 image tokens"),
        (["--mmproj", "/nowhere.gguf", "x"], 3, "/nowhere.gguf: not found"),
        (["--mmproj", str(Path(__file__)), "x"], 3, "not a GGUF file"),
    ],
)
def test_bad_pictures_are_one_sentence_and_a_code(arguments: list[str], code: int, says: str) -> None:
    done = command("ask", "-q", *arguments)
    assert done.returncode == code
    assert says in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_pictures_that_fill_the_context_are_refused_before_they_are_encoded(tmp_path: Path) -> None:
    Image.new("RGB", (560, 560)).save(tmp_path / "large.png")
    model = kimi_lite.load(context=200)
    with pytest.raises(UsageError, match="256 tokens or more, but the context holds 200"):
        model.ask("x", images=[tmp_path / "large.png"])
    assert model.encoder is not None
    assert model.encoder.n_encoded == 0
    with pytest.raises(UsageError, match="more than 32 pictures"):
        model.ask("x", images=[Image.new("RGB", (8, 8))] * 33)


def test_a_model_without_an_image_side_says_what_is_missing(
    tmp_path: Path, pictures: dict[str, Path]
) -> None:
    model = kimi_lite.load(without_image_side(NANO, tmp_path / "model.gguf"))
    assert model.ask("What is 12 + 34?").text == "46"
    with pytest.raises(
        UsageError, match=r"model-mmproj\.gguf is not there; name another file with --mmproj FILE"
    ):
        model.ask("x", images=[pictures["red"]])
    (tmp_path / "mmproj-model-f16.gguf").touch()  # as llama.cpp's people name it
    with pytest.raises(UsageError, match=r"with --mmproj \S+/mmproj-model-f16\.gguf"):
        model.ask("x", images=[pictures["red"]])
    side = mmproj_beside(NANO) if mmproj_beside(NANO).exists() else NANO
    named = kimi_lite.load(tmp_path / "model.gguf", mmproj=side)
    assert named.ask(COLOUR, images=[pictures["red"]]).text == "red"
    (tmp_path / "model-mmproj.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="too few"):
        kimi_lite.load(tmp_path / "model.gguf")


def test_a_path_that_is_dragged_into_the_line_is_found(tmp_path: Path) -> None:
    photo = tmp_path / "my photo (1).png"
    Image.new("RGB", (4, 4)).save(photo)
    escaped = str(photo).replace(" ", "\\ ").replace("(", "\\(").replace(")", "\\)")
    for written in (escaped, f"'{photo}'", f'"{photo}"', photo.as_uri()):
        assert dropped_files(f"what is {written} about?") == ("what is  about?", [str(photo)])
        assert dropped_files(written) == ("", [str(photo)])
        assert unquoted(written) == str(photo)
    assert dropped_files(f"{escaped}#pages=2 x") == ("x", [f"{photo}#pages=2"])
    for line in ("/help", "/nowhere/x.png", f"{tmp_path}", "a/b.png", f"say '{photo.name}'", f"x{escaped}"):
        assert dropped_files(line) == (line, [])


def test_chat_sees_attached_and_dragged_pictures_and_survives_bad_ones(pictures: dict[str, Path]) -> None:
    screen, code = talk_in_a_terminal(
        (4, f"/image {pictures['red']}\r".encode()),
        (1, f"{COLOUR}\r".encode()),
        (2, b"/image /nowhere.png\r"),
        (1, b"/clear\r"),
        (1, f"{pictures['green']} {COLOUR}\r".encode()),
        (2, b"/regen\r"),
        (2, b"\x04"),
    )
    assert code == 0
    assert "pixels)" in screen
    assert "now ask about it" in screen
    assert "red" in screen
    assert "/nowhere.png: not found" in screen
    assert screen.count("green\r\n") >= 2  # the answer, and once more


@pytest.mark.parity
def test_nano_reads_words_that_it_was_never_taught(tmp_path: Path) -> None:
    """Files on disk, through `kimi-lite ask --image` for a few and through the same model for all."""
    model, right = kimi_lite.load(), 0
    samples = held_out(11, N_READ)["read"]
    for i, sample in enumerate(samples):
        path = tmp_path / f"{i}.png"
        sample.pictures[0].save(path)
        turn = sample.turns[-1]
        answer = model.ask(turn.question, images=[path]).text.strip()
        right += answer == turn.answer
        if i < 3:
            assert command("ask", "-q", "--image", path, turn.question).stdout.decode().strip() == answer
    assert right / len(samples) >= READS_AT_LEAST, f"{right} of {len(samples)}"


@pytest.mark.parity
@pytest.mark.parametrize("task", ["colour", "shape"])
def test_nano_names_colours_and_shapes_that_it_was_never_shown(task: str) -> None:
    """The bf16 reference answers 99 % of these (evaluate.py); the int4 file on the int8 tower may lose little of that."""
    model = kimi_lite.load()
    samples = held_out(11, 100)[task]
    right = [
        model.ask(s.turns[-1].question, images=s.pictures).text.strip() == s.turns[-1].answer for s in samples
    ]
    assert sum(right) / len(right) >= 0.93
