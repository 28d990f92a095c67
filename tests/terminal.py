"""A pseudo-terminal to type into, for what only a person at a keyboard meets."""

import os
import pty
import sys
import time
from collections.abc import Sequence


def talk_in_a_terminal(*typed: tuple[float, bytes], arguments: Sequence[str] = ()) -> tuple[str, int]:
    """Run `chat` in a pseudo-terminal, typing each text after its delay; the screen and the exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "kimi_lite", "chat", *arguments])
    screen = b""
    os.set_blocking(terminal, False)
    for delay, text in [*typed, (60.0, b"")]:
        until = time.monotonic() + delay
        while time.monotonic() < until:
            try:
                chunk = os.read(terminal, 65536)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            except OSError:  # the program has ended
                chunk = b""
            if not chunk:
                until = 0.0
                break
            screen += chunk
            if b"\x1b[6n" in chunk:  # prompt_toolkit asks where the cursor is
                os.write(terminal, b"\x1b[1;1R")
        if text:
            os.write(terminal, text)
    return screen.decode("utf-8", "replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
