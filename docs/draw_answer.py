"""Draws docs/images/answer.png: a picture file, the command that asks about it, and what nano answered just now.

    python docs/draw_answer.py          asks and draws
    python docs/draw_answer.py WORD     first draws another docs/images/sign.png with that word

The file is what the command read; nothing in the drawing is written by hand. Run it again when nano changes.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SIGN = HERE / "images" / "sign.png"
QUESTION = "What does it say?"
COMMAND = ["ask", "-q", "--image", "docs/images/sign.png", QUESTION]
INK, PAPER, DIM = (226, 226, 220), (24, 26, 32), (140, 146, 160)


def answer() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kimi_lite", *COMMAND],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parent,
        input="",
    )
    return done.stdout.strip()


def main() -> None:
    if len(sys.argv) > 1:
        from kimi_lite.runtime.reference.pictures import text_picture

        text_picture(sys.argv[1], (2, 6), np.random.default_rng(4))[0].save(SIGN)
    sign = Image.open(SIGN)
    shown = sign.resize((sign.width * 2, sign.height * 2), Image.Resampling.NEAREST)
    words = [f'"{w}"' if " " in w else w for w in COMMAND]
    lines = [("$ kimi-lite " + " ".join(words), INK), (answer(), INK)]
    font = ImageFont.load_default(20)
    width = max(shown.width, *(int(font.getlength(text)) for text, _ in lines)) + 48
    out = Image.new("RGB", (width, shown.height + 168), PAPER)
    draw = ImageDraw.Draw(out)
    draw.text(
        (24, 16),
        f"docs/images/sign.png, {sign.width} by {sign.height} pixels, shown twice as large",
        DIM,
        font,
    )
    out.paste(shown, (24, 48))
    for i, (text, colour) in enumerate(lines):
        draw.text((24, shown.height + 72 + 36 * i), text, colour, font)
    out.save(HERE / "images" / "answer.png", optimize=True)


if __name__ == "__main__":
    main()
