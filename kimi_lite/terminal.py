"""What a model says, as a terminal is given it: no control characters, and its Markdown styled as it comes.

A text or a picture that is asked about can bring a model to say escape codes, which a terminal obeys: they retitle
windows, write to the clipboard, hide what was said. So each is shown as the sign for it, ␛, and none is sent.

Markdown keeps every character, markers too: what is copied from the screen is what was said, and a formula's stars and
lines stay where they are. Styles are added around it: headings and **bold** in bold, `code` and code blocks in a colour,
markers dim. Nothing waits longer than it takes to know what a marker is, and nothing on the screen is written twice.
"""

import os
import re
from typing import TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BOLD, CODE = "\x1b[1m", "\x1b[36m"

CONTROL = {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\n\t"}
CONTROL |= dict.fromkeys(range(0x7F, 0xA0), 0x2421)  # of eight bits, which some terminals obey as well

# A line's first characters, as long as they may become a marker, and those that are one.
UNDECIDED = re.compile(r" *(#{0,6}|`*|`{3,}[^`]*|~*|~{3,}.*|>|[-*+]|\d{1,3}[.)]?)")
MARKER = re.compile(r" *(?:[-*+]|\d{1,3}[.)]) | {0,3}> ?")
HEADING = re.compile(r" {0,3}#{1,6} ")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
INLINE = re.compile(r"`+|\*+|\\[^\n]?|[^`*\\\n]+")  # of which a run of ` or *, or a lone \, may go on


def colours(stream: TextIO) -> bool:
    """Whether a stream wants escape codes: a terminal, and neither NO_COLOR nor a dumb terminal says otherwise."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """The text with a sign for each control character but tabs and ends of lines."""
    return text.translate(CONTROL)


class Markdown:
    """Styles a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""  # what is not decided yet
        self._start = True  # of a line, whose marker is not known yet
        self._line = ""  # the style of the whole line
        self._bold = False
        self._code = ""  # the run of ` that ends it
        self._fence = ""  # likewise, of a code block
        self._before = "\n"  # the last character that was said

    def feed(self, text: str) -> str:
        """The next piece, styled, without what is not decided before the one after it."""
        return self._styled(text, last=False)

    def end(self) -> str:
        """What was held back, and plain characters for whatever follows."""
        return self._styled("", last=True) + self._leave()

    def _styled(self, text: str, *, last: bool) -> str:
        text, self._held, out = self._held + text, "", ""
        while text:
            line, newline, _ = text.partition("\n")
            if self._start:
                if not (last or newline) and self._may_become_marker(line):
                    break
                self._start = False
                styled, taken = self._begin(line)
            elif not line:
                styled, taken = self._leave() + "\n", "\n"
                self._start = True
            elif self._fence:
                styled = taken = line
            else:
                found = INLINE.match(line)
                assert found is not None
                taken = found[0][0] if self._code and found[0][0] == "\\" else found[0]
                if taken == text and taken[0] in "`*\\" and len({*taken}) == 1 and not last:
                    break
                after = text[len(taken) : len(taken) + 1]
                styled = self._marker(taken, after) if taken[0] in "`*" else taken
            out += styled
            self._before, text = taken[-1:] or self._before, text[len(taken) :]
        self._held = text
        return out

    def _may_become_marker(self, line: str) -> bool:
        if self._fence:
            return not line.strip(" ").strip(self._fence[0])
        return UNDECIDED.fullmatch(line) is not None

    def _begin(self, line: str) -> tuple[str, str]:
        """A line's beginning, styled, and which characters that took."""
        fence = FENCE.match(line)
        if self._fence:
            if fence is None or line[fence.end() :].strip() or not fence[1].startswith(self._fence):
                return CODE, ""
            self._fence = ""
            return DIM + line + PLAIN, line
        if fence and "`" not in line[fence.end() :]:
            self._fence = fence[1]
            return DIM, ""  # the rest of its line, a language's name, as well
        if HEADING.match(line):
            self._line = BOLD
            return BOLD, ""
        marker = MARKER.match(line)
        return (DIM + marker[0] + PLAIN, marker[0]) if marker else ("", "")

    def _marker(self, run: str, after: str) -> str:
        """A run of ` or *, which begins a style, ends it, or is text; `after` is the character behind it, if any."""
        if run[0] == "`" and self._code in ("", run):
            self._code = "" if self._code else run
        elif run == "**" and not self._code and not (self._before if self._bold else after or " ").isspace():
            self._bold = not self._bold
        else:
            return run
        return DIM + run + PLAIN + self._line + BOLD * self._bold + CODE * bool(self._code)

    def _leave(self) -> str:
        styled = self._line or self._bold or self._code or self._fence
        self._line, self._bold, self._code = "", False, ""
        return PLAIN if styled else ""
