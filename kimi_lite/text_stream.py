"""From a stream of bytes to thinking and answer, as people and pipes may see them.

The model writes `◁think▷ … ◁/think▷ answer`. Its tokens cut through characters and through those marks, so three steps
work on the stream together: an incremental UTF-8 decoder, a splitter at the first opening mark (if the output begins
with it) and the first closing mark after it, and a watch for stop strings in the answer. Text that may still turn out
to be part of a mark or a stop string is held back, never more than that. White space around both parts is dropped, as
the makers' own program does; but an answer that keeps to a schema or an expression may end with some.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

OPEN, CLOSE = "◁think▷", "◁/think▷"
Kind = Literal["thinking", "answer"]
Piece = tuple[Kind, str]


@dataclass
class TextStream:
    """Feed bytes, get pieces; `stopped` once a stop string was met."""

    stop: tuple[str, ...] = ()
    keep_end: bool = False  # white space at the answer's end is part of it
    part: Literal["start", "thinking", "answer"] = "start"
    stopped: bool = False
    _held: str = ""
    _space: str = ""  # white space that only counts if more text follows
    _begun: bool = False  # the present part has shown text
    _utf8: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Pieces that have become certain."""
        self._held += self._utf8.decode(data)
        yield from self._move(final=False)

    def finish(self, cut: bool = False) -> Iterator[Piece]:
        """What is left when no more bytes come; half a character becomes U+FFFD.

        If it was a limit that `cut` the output off, half a character or half a mark is nobody's text.
        """
        self._held += self._utf8.decode(b"", final=not cut)
        yield from self._move(final=True, cut=cut)

    def _move(self, final: bool, cut: bool = False) -> Iterator[Piece]:
        if self.part == "start":
            text = self._held.lstrip()
            if text.startswith(OPEN):
                self.part, self._held = "thinking", text[len(OPEN) :]
            elif OPEN.startswith(text) and (cut or not final):
                return  # may still become the opening mark
            else:
                self.part = "answer"
        if self.part == "thinking":
            before, mark, after = self._held.partition(CLOSE)
            if mark:
                yield from self._show("thinking", before)
                self.part, self._held, self._space, self._begun = "answer", after, "", False
            else:
                yield from self._release("thinking", (CLOSE,), final and not cut)
        if self.part == "answer" and not self.stopped:
            found = [at for at in (self._held.find(s) for s in self.stop) if at >= 0]
            if found:
                text, self._held, self.stopped = self._held[: min(found)], "", True
                yield from self._show("answer", text)
            else:
                yield from self._release("answer", self.stop, final)

    def _release(self, kind: Kind, marks: tuple[str, ...], final: bool) -> Iterator[Piece]:
        """Show all but a tail that could begin one of the marks."""
        keep = 0
        if not final:
            for mark in marks:
                for n in range(min(len(mark) - 1, len(self._held)), keep, -1):
                    if self._held.endswith(mark[:n]):
                        keep = n
                        break
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        yield from self._show(kind, text)

    def _show(self, kind: Kind, text: str) -> Iterator[Piece]:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        body = text if self.keep_end and kind == "answer" else text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._begun = True
            yield kind, body
