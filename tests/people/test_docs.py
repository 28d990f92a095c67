"""docs/cli.md holds what `--help` prints, and README's links lead somewhere. `python tests/people/test_docs.py` rewrites."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ("", "ask", "chat", "serve", "quantize", "pack", "info", "bench", "plan", "doctor")
HEAD = """# Commands

What `--help` prints, and the exit codes that scripts may rely on.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug of ours, with a traceback |
| 2 | an option, a question or a setting that cannot be served |
| 3 | a model file or checkpoint that is missing, damaged or another model's |
| 4 | not enough memory or disk |
| 7 | the reply was cut off by `--max-tokens` or the context |
| 130, 141 | interrupted; the reader of the output went away |

`KIMI_LITE_ISA` forces an instruction set by name (`kimi-lite doctor` lists them), `KIMI_LITE_DEBUG=1` shows the traceback
behind an error, `NO_COLOR` turns colours off, `KIMI_LITE_IMAGE_CACHE` names the directory of encoded pictures or is `off`,
`KIMI_LITE_EXPERT_USAGE` that of the profile by which experts get their place ([gpu](gpu.md)), `KIMI_LITE_KERNEL_CACHE` that
of a card's compiled kernels; each may be `off`. `KIMI_LITE_API_KEY` is the key that `serve` asks for ([server](server.md)). `KIMI_LITE_DEVICE=simulated:8G` puts a simulated card in a card's place.
"""


def cli_page() -> str:
    parts = [HEAD]
    for name in COMMANDS:
        command = [sys.executable, "-m", "kimi_lite", *name.split(), "--help"]
        environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        body = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"\n## kimi-lite {name}".rstrip() + f"\n\n```\n{body}\n```\n")
    return "".join(parts)


def test_the_command_page_is_what_help_prints() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_page()


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_shown_answer_is_what_nano_says() -> None:
    page = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    found = re.search(r"^\$ kimi-lite (.+)\n(.+)$", page, re.MULTILINE)
    assert found
    command = [sys.executable, "-m", "kimi_lite", *shlex.split(found[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, input="")
    assert done.stdout.strip() == found[2]


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(cli_page(), encoding="utf-8")
