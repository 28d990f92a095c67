"""kimi-lite as a person starts it."""

import os
import subprocess
import sys


def command(*arguments: str, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_lite", *arguments],
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )
