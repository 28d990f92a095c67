"""The conversation in a terminal, and the printing that `ask` shares with it.

Ctrl-C while an answer is coming stops it and keeps what was said; at a prompt with text it clears the line; at an
empty prompt it says how to leave. Ctrl-D leaves. Thinking is dim and stands apart from the answer.

A picture comes with `/image PATH`, or by dragging its file into the line: a word that begins like a path, ends like a
picture, PDF or video, and is there. Alt-Enter begins a new line; lines that are pasted stay lines.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

from kimi_lite.api import Event, Model, Stats
from kimi_lite.errors import KimiLiteError, UsageError
from kimi_lite.images import Picture, load_pictures
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.terminal import DIM, PLAIN, Markdown, colours, visible

MOST_TEXT = 2 << 20  # bytes of a text file: 128K tokens have some 500 KB
PROGRESS_FROM = 512  # prompt tokens: shorter prompts are done before a line could be read
SEEN = "png jpg jpeg webp gif bmp tif tiff ppm avif heic heif pdf mp4 mov m4v mkv webm avi".split()
HELP = """/help              this list
/image SOURCE      a picture for the next question: a path, a URL, FILE.pdf#pages=2, FILE.mp4#frames=8
/file PATH         a text for the next question, in front of it
/save [PATH]       write the conversation to a file; without a path, to the one it came from
/load PATH         go on with one that was saved
/system TEXT       set the system message and start anew
/set NAME VALUE    temperature, top_p, top_k, min_p, seed, max_tokens, thinking_budget
/regen             answer the last question again
/stats             statistics of the last answer
/clear             forget the conversation
/exit              leave (Ctrl-D)"""


class Printer:
    """Writes one reply as it comes: thinking to one stream, answer to another; `raw` leaves its Markdown without styles."""

    def __init__(
        self, out: TextIO, err: TextIO, *, show_thinking: bool, show_answer: bool = True, raw: bool = False
    ) -> None:
        self.out, self.err = out, err
        self.show_thinking, self.show_answer = show_thinking, show_answer
        self._markdown = Markdown() if colours(out) and not raw else None
        self.answer = self.thinking = ""
        self.done: Event | None = None
        self._dim = colours(err)
        self._status = False

    def show(self, event: Event) -> None:
        self._clear_status()
        if event.kind == "thinking":
            if self.show_thinking:
                self.err.write(
                    (DIM if self._dim and not self.thinking else "") + _shown(event.text, self.err)
                )
                self.err.flush()
            self.thinking += event.text
        elif event.kind == "answer":
            self._close_thinking()
            if self.show_answer:
                said = _shown(event.text, self.out)
                self.out.write(self._markdown.feed(said) if self._markdown else said)
                self.out.flush()
            self.answer += event.text
        else:
            self.done = event

    def end(self) -> None:
        """Leave both streams at the beginning of a line and in plain colours."""
        self._clear_status()
        self._close_thinking()
        if self.answer and self.show_answer:
            self.out.write((self._markdown.end() if self._markdown else "") + "\n")
            self.out.flush()

    def _close_thinking(self) -> None:
        if self.thinking and self.show_thinking and not self.answer:
            self.err.write((PLAIN if self._dim else "") + "\n")
            self.err.flush()
            self.show_thinking = False  # what was open is closed

    def statistics(self, stats: Stats) -> None:
        seen = f"{stats.image_tokens} image tokens in {stats.encode_s:.1f} s, " if stats.image_tokens else ""
        line = seen + (
            f"{stats.prompt_tokens} prompt tokens ({stats.reused} reused, {stats.prefill_tok_per_s:.0f} tok/s), "
            f"{stats.tokens} tokens at {stats.decode_tok_per_s:.1f} tok/s, context {stats.context_used}/{stats.context}"
        )
        if stats.guessed:
            line += f", {stats.guessed_right} of {stats.guessed} guesses right"
        if stats.gpu_dense:
            line += f", dense weights in {stats.gpu_dense} by bitsandbytes"
        self.err.write(f"{DIM}{line}{PLAIN}\n" if self._dim else f"{line}\n")

    def image_progress(self, share: float) -> None:
        """The status line while new pictures are encoded, on a terminal only."""
        if self.err.isatty():
            self._status = True
            self.err.write(f"\rlooking at the picture: {share:4.0%}")
            self.err.flush()

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, int], None]]:
        """A status line for long prompts, on a terminal only."""

        def on_progress(done: int, total: int) -> None:
            if total >= PROGRESS_FROM and self.err.isatty():
                self._status = True
                self.err.write(f"\r\x1b[Kreading the prompt: {done}/{total} tokens")
                self.err.flush()

        try:
            yield on_progress
        finally:
            self._clear_status()

    def _clear_status(self) -> None:
        if self._status:
            self.err.write("\r\x1b[K")
            self._status = False


def _shown(text: str, stream: TextIO) -> str:
    """What a file gets as it is, and a terminal without control characters."""
    return visible(text) if stream.isatty() else text


class Session:
    """One conversation at the terminal."""

    def __init__(
        self,
        model: Model,
        options: SamplingOptions,
        max_tokens: int | None,
        thinking_budget: int | None,
        *,
        show_thinking: bool,
        raw: bool = False,
    ) -> None:
        self.model, self.options, self.show_thinking, self.raw = model, options, show_thinking, raw
        self.max_tokens, self.thinking_budget = max_tokens, thinking_budget
        self.last: Stats | None = None
        self.pictures: list[object] = []  # for the next question
        self.texts: list[str] = []  # likewise
        self.file: Path | None = None  # where the conversation came from, or was saved last

    def run(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        prompt: PromptSession[str] = PromptSession(history=InMemoryHistory(), key_bindings=keys)
        print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.", file=sys.stderr)
        while True:
            try:
                line = prompt.prompt("> ").strip()
            except KeyboardInterrupt:
                print("Ctrl-D or /exit to leave.", file=sys.stderr)
                continue
            except EOFError:
                return
            try:
                if line in ("/exit", "/bye", "/quit"):
                    return
                if not line.startswith("/image"):
                    line, dropped = dropped_files(line)
                    for source in dropped:
                        self.attach(source)
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except KimiLiteError as error:  # the chat goes on
                print(f"kimi-lite: {visible(str(error))}", file=sys.stderr)

    def attach(self, source: str) -> None:
        """Open a picture now, so that what is wrong with it is said at once."""
        loaded: list[Picture] = load_pictures([source], offline=self.model.offline)
        self.pictures += loaded
        for picture in loaded:
            print(f"({picture.name}: {picture.image.width}×{picture.image.height} pixels)", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Ask and print; Ctrl-C stops between tokens and keeps what was said."""
        pictures, self.pictures = self.pictures, []
        text, self.texts = "\n".join([*self.texts, text]), []
        printer = Printer(sys.stdout, sys.stderr, show_thinking=self.show_thinking, raw=self.raw)
        with printer.progress() as on_progress:
            events = self.model.chat(
                text,
                images=pictures,
                options=self.options,
                max_tokens=self.max_tokens,
                thinking_budget=self.thinking_budget,
                on_progress=on_progress,
                on_image_progress=printer.image_progress,
            )
            try:
                for event in events:
                    printer.show(event)
            except KeyboardInterrupt:
                events.close()  # type: ignore[attr-defined]
            finally:
                printer.end()
        if printer.done is None:
            print("(stopped)", file=sys.stderr)
            return
        self.last = printer.done.stats
        if printer.done.reason in ("length", "context"):
            where = "inside its thinking" if not printer.answer else "before it was complete"
            what = "/set max_tokens" if printer.done.reason == "length" else "/clear, or a larger --context,"
            print(f"(cut off {where}; {what} makes room)", file=sys.stderr)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        conversation = self.model.conversation
        match name:
            case "/help" | "/?":
                print(HELP, file=sys.stderr)
            case "/clear":
                self.begin_anew()
            case "/system":
                conversation.system = rest.strip() or None
                self.begin_anew()
            case "/save":
                self.save(rest.strip())
            case "/load" if rest.strip():
                self.load(Path(unquoted(rest.strip())).expanduser())
            case "/file" if rest.strip():
                self.texts.append(text_file(Path(unquoted(rest.strip())).expanduser()))
                print("(now ask about it)", file=sys.stderr)
            case "/load" | "/file":
                raise UsageError(f"{name} needs a file: {name} PATH")
            case "/stats" if self.last:
                Printer(sys.stdout, sys.stderr, show_thinking=False).statistics(self.last)
            case "/stats":
                print("no answer yet", file=sys.stderr)
            case "/regen":
                if not conversation.messages:
                    raise UsageError("there is no question to answer again")
                content = conversation.messages[-2].content
                del conversation.messages[-2:], conversation.thinking[-1:]
                *pictures, question = [content] if isinstance(content, str) else content
                assert isinstance(question, str)
                self.pictures = [*pictures]
                self.answer(question)
            case "/image" if rest.strip():
                self.attach(unquoted(rest.strip()))
                print("(now ask about it)", file=sys.stderr)
            case "/image":
                raise UsageError("/image needs a picture: /image photo.jpg")
            case "/set":
                self.set(*[*rest.split(), "", ""][:2])
            case _:
                raise UsageError(f"{name} is not a command; /help lists them")

    def begin_anew(self) -> None:
        """Without what was said, shown or read in."""
        self.model.clear()
        self.pictures, self.texts, self.file = [], [], None

    def save(self, named: str) -> None:
        """Write the conversation; a file that it did not come from is never overwritten."""
        path = Path(unquoted(named)).expanduser() if named else self.file
        if path is None:
            raise UsageError("/save needs a file to write to: /save trip.json")
        if path != self.file and path.exists():
            raise UsageError(f"{path} exists; give another name, or delete it first")
        if not self.model.conversation.messages:
            raise UsageError("nothing was said yet, so there is nothing to save")
        self.model.conversation.save(path)
        self.file = path
        print(f"(saved; go on with kimi-lite chat --resume {shlex.quote(str(path))})", file=sys.stderr)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation, whose last question and answer are shown."""
        self.model.resume(path)
        self.pictures, self.texts, self.file = [], [], path
        said = self.model.conversation.messages
        print(f"({len(said) // 2} questions and answers; the last were)", file=sys.stderr)
        for message in said[-2:]:
            parts = [message.content] if isinstance(message.content, str) else message.content
            mark = "> " if message.role == "user" else ""
            print(mark + visible(" ".join(part if isinstance(part, str) else "(picture)" for part in parts)))

    def set(self, name: str, value: str) -> None:
        """Change one setting, with the checks of `SamplingOptions`."""
        kinds: dict[str, type[int] | type[float]] = {
            "temperature": float,
            "top_p": float,
            "min_p": float,
            "top_k": int,
        }
        kinds |= {"seed": int, "max_tokens": int, "thinking_budget": int}
        if name not in kinds:
            raise UsageError(f"/set knows {', '.join(kinds)}, not {name!r}")
        try:
            number = kinds[name](value)
        except ValueError:
            raise UsageError(f"/set {name} needs a number, not {value!r}") from None
        match name:
            case "max_tokens":
                self.max_tokens = int(number)
            case "thinking_budget":
                self.thinking_budget = int(number)
            case _:
                changes: dict[str, Any] = {name: number}
                self.options = replace(self.options, **changes)


def text_file(path: Path) -> str:
    """What a file says. Raises UsageError if it is not there, not text, or more than any context holds."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise UsageError(
                f"{path}: more than {MOST_TEXT >> 20} MB, which no context holds; give a part of it"
            )
        return data.decode().strip()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; pictures, PDFs and videos come with /image") from None


def dropped_files(line: str) -> tuple[str, list[str]]:
    """The line without the paths that a terminal writes when files are dragged into it, and those paths."""
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        source = unquoted(match[0])
        path = Path(source.partition("#")[0]).expanduser()
        if path.suffix[1:].lower() not in SEEN or not path.is_file():
            return match[0]
        found.append(source)
        return ""

    # Quoted whole, or with its spaces escaped; beginning like a path.
    start = r"(?:file://|~/|\.{0,2}/|[A-Za-z]:[\\/])"
    rest = re.sub(rf"(?<!\S)(?:'{start}[^']+'|\"{start}[^\"]+\"|{start}(?:\\.|[^\s\\])+)(?!\S)", take, line)
    return (rest.strip() if found else line), found


def unquoted(word: str) -> str:
    """A path as a shell would read it: quotes and escapes taken off, file:// resolved."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    elif os.sep == "/":
        word = re.sub(r"\\(.)", r"\1", word)
    return unquote(word[7:]) if word.startswith("file://") else word
