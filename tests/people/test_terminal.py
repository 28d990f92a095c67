"""What reaches a terminal: no escape code of a model's, every other character, and styles where Markdown has them."""

import io
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from commands import command
from markdown_it import MarkdownIt
from terminal import talk_in_a_terminal

from kimi_lite.api import Event
from kimi_lite.chat import Printer
from kimi_lite.terminal import BOLD, CODE, DIM, PLAIN, Markdown, visible

EVIL = "\x1b]0;owned\x07 and \x9b31m"  # a window's title, and a colour begun by eight bits


def cells(screen: str) -> list[tuple[str, frozenset[str]]]:
    """Each character with the styles that are on."""
    found, styles = [], frozenset[str]()
    for part in re.split(r"(\x1b\[\d*m)", screen):
        if part.startswith("\x1b"):
            assert part in (PLAIN, DIM, BOLD, CODE)
            styles = frozenset() if part == PLAIN else styles | {part}
        else:
            found += [(character, styles) for character in part]
    return found


def styled(text: str) -> list[tuple[str, frozenset[str]]]:
    markdown = Markdown()
    return cells(markdown.feed(text) + markdown.end())


def within(text: str, style: str) -> list[str]:
    """What is in that style and not dim, as markers are, run by run."""
    marks = "".join("x" if style in on and DIM not in on else "." for _, on in styled(text))
    return [text[m.start() : m.end()] for m in re.finditer("x+", marks)]


def document(rng: random.Random) -> str:
    """Blocks, with an empty line between them, of what models write."""
    words = [
        "sum",
        "2*3*4",
        "a_b",
        "1.5",
        "#5",
        "x ** y",
        "- no",
        "{}",
        "\\*",
        "it's",
        "$\\frac{1}{2}$",
        "**",
    ]

    def line(n: int) -> str:
        parts = []
        for _ in range(n):
            word, kind = rng.choice(words[:5]), rng.randrange(4)
            parts.append(
                f"**{word} {word}**"
                if kind == 0
                else f"`{word} * **`"
                if kind == 1
                else rng.choice(words[:-1])
            )
        return "of " + " ".join(parts)

    def block() -> str:
        match rng.randrange(5):
            case 0:
                return "#" * rng.randint(1, 6) + " " + line(2)
            case 1:
                fence = rng.choice(["```", "~~~", "````"])
                return f"{fence}python\nx = 2**3\n\n# `no` **bold**\n{fence}"
            case 2:
                return "\n".join(f"{mark} {line(2)}" for mark in ("-", "-"))
            case 3:
                return f"1. {line(1)}\n2. {line(1)}"
            case _:
                return line(rng.randint(1, 6))

    return "\n\n".join(block() for _ in range(rng.randint(1, 6))) + "\n"


def parsed(text: str) -> tuple[list[str], list[str]]:
    """Bold texts outside of headings, and code, by a parser of Markdown. A formula's stars are emphasis there, and text here."""
    bold, code, tokens = [], [], MarkdownIt().parse(text)
    for before, token in pairwise([tokens[0], *tokens]):
        if token.type == "fence":
            code += [line for line in token.content.splitlines() if line]
        is_bold = False
        for child in token.children or []:
            if child.type == "strong_open" and before.type != "heading_open":
                is_bold = True
                bold.append("")
            elif child.type == "strong_close":
                is_bold = False
            elif child.type == "code_inline":
                code.append(child.content)
            elif is_bold:
                bold[-1] += child.content or child.markup
    return bold, code


@pytest.mark.parametrize("seed", range(40))
def test_bold_and_code_are_where_a_markdown_parser_has_them(seed: int) -> None:
    text = document(random.Random(seed))
    bold, code = parsed(text)
    assert [part for run in within(text, CODE) for part in run.splitlines()] == code
    headings = re.compile(r"^#+ .*$", re.MULTILINE)
    assert within(headings.sub("", text), BOLD) == bold
    for heading in headings.findall(text):
        assert all(on & {BOLD, DIM, CODE} for _, on in styled(heading))


@pytest.mark.parametrize(
    "text",
    [
        "````\nx\n```\ny\n````\n**z**",  # a shorter fence is part of the code
        "```\nx\n~~~\ny\n```\n**z**",  # so is another kind
        "```\nx\n``` y\n```\n**z**",  # and one that is followed by something
        "```\nx\n`````\n**z**",  # a longer one ends it
        "``` a ``` b\n**z**",  # in one line it is a span, as in Markdown
        "of `C:\\` and **z**",  # in code a backslash is one
        "of \\`no\\` and \\**z**",  # elsewhere it takes a marker's meaning
        "of ``a ` b`` and `c`",
    ],
)
def test_corners_of_code_are_those_of_markdown(text: str) -> None:
    bold, code = parsed(text)
    assert [part.strip() for run in within(text, CODE) for part in run.splitlines() if part] == code
    assert within(text, BOLD) == bold


@pytest.mark.parametrize("seed", range(20))
def test_no_character_is_lost_and_pieces_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    text = document(rng) + rng.choice(["", "an **open", "`open", "```", "\\", "1", "* ", "~~~x\nend"])
    whole = styled(text)
    assert "".join(character for character, _ in whole) == text
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.choice([1, 5, len(text)])))
    markdown, screen = Markdown(), ""
    for start, end in pairwise([0, *cuts, len(text)]):
        screen += markdown.feed(text[start:end])
    assert cells(screen + markdown.end()) == whole


def test_words_are_not_held_back() -> None:
    markdown = Markdown()
    said = [
        markdown.feed(piece) for piece in ("The", " total", " is 3", "*", "4", " `", "x`", "\n", "-", " one")
    ]
    shown = ["".join(character for character, _ in cells(piece)) for piece in said]
    assert shown == ["The", " total", " is 3", "", "*4", " ", "`x", "`\n", "", "- one"]


def test_a_style_ends_with_its_line() -> None:
    after = [on for _, on in styled("# Title\n**open `code\nplain")[-len("plain") :]]
    assert after == [frozenset()] * 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(out: io.StringIO, *events: Event, raw: bool = False) -> tuple[str, str]:
    err = Terminal()
    printer = Printer(out, err, show_thinking=True, raw=raw)
    for event in events:
        printer.show(event)
    printer.end()
    return out.getvalue(), err.getvalue()


REPLY = (Event("thinking", f"hm {EVIL}"), Event("answer", "**Yes**"), Event("answer", EVIL))


def test_a_terminal_gets_styles_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = printed(Terminal(), *REPLY)
    assert "".join(c for c, _ in cells(out)) == "**Yes**␛]0;owned␇ and ␡31m\n"
    assert [c for c, on in cells(out) if BOLD in on and DIM not in on] == list("Yes")
    assert "".join(c for c, _ in cells(err)) == "hm ␛]0;owned␇ and ␡31m\n"
    assert printed(Terminal(), *REPLY, raw=True)[0] == "**Yes**␛]0;owned␇ and ␡31m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(Terminal(), *REPLY)[0] == "**Yes**␛]0;owned␇ and ␡31m\n"


def test_a_file_gets_what_was_said() -> None:
    assert printed(io.StringIO(), *REPLY)[0] == f"**Yes**{EVIL}\n"


def test_tabs_lines_and_other_scripts_stay() -> None:
    assert visible("a\tb\n月 é 🙂\r\n") == "a\tb\n月 é 🙂␍\n"


def test_a_saved_chat_and_a_files_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    saved = tmp_path / "trip.json"
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": f"**Hi** {EVIL}"}]
    saved.write_text(json.dumps({"schema": "kimi-lite/1", "messages": turns}))
    screen, code = talk_in_a_terminal((4, b"\x04"), arguments=["--resume", str(saved)])
    assert code == 0
    assert "␛]0;owned␇" in screen
    assert "\x1b]0;owned" not in screen
    missing = command("info", "\x1b]0;owned\x07.gguf")
    assert missing.returncode == 3
    assert "␛]0;owned␇.gguf" in missing.stderr
