"""`kimi-lite` and `python -m kimi_lite`: runs the command line and turns errors into one sentence and an exit code.

0 done · 1 a bug of ours · 2 usage · 3 model file · 4 memory or disk · 7 no answer within the limit
130 interrupted · 141 the reader of our output went away
"""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from kimi_lite.errors import KimiLiteError, KimiLiteWarning
from kimi_lite.terminal import visible


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    import typer

    from kimi_lite.cli import app

    if hasattr(signal, "SIGPIPE"):
        signal.signal(
            signal.SIGPIPE, signal.SIG_DFL
        )  # a reader that goes away ends us quietly, as it does `cat`
    warnings.showwarning = _show_warning
    click_error: type[Any] = typer.BadParameter.__mro__[2]  # ClickException, which typer keeps to itself
    try:
        code = app(
            args=None if arguments is None else list(arguments), prog_name="kimi-lite", standalone_mode=False
        )
        sys.stdout.flush()
    except KimiLiteError as error:
        if os.environ.get("KIMI_LITE_DEBUG"):
            raise
        print(f"kimi-lite: {visible(str(error))}", file=sys.stderr)
        code = error.exit_code
    except typer.Abort:
        code = 130
    except click_error as error:
        error.show()
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, what a shell expects
    sys.exit(code or 0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, KimiLiteWarning):
        print(f"kimi-lite: warning: {visible(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    main()
