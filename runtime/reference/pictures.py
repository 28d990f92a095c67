"""Draws nano's pictures: rendered words and numbers, and scenes of coloured shapes.

Fonts come from font packages on PyPI (`pip install kimi-lite[train]`) and from Pillow's own; all carry open licences.
Every picture is drawn for a token grid (rows, columns of 28 pixels), so that a batch shares one size.
"""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONT_PACKAGES = (
    "font_roboto",
    "font_source_sans_pro",
    "font_caladea",
    "font_hanken_grotesk",
    "font_source_serif_pro",
)
FONT_STYLES = ("Regular", "Bold", "Medium", "Semibold", "SemiBold")
COLOURS = {
    "red": (214, 30, 36),
    "green": (28, 150, 52),
    "blue": (32, 70, 210),
    "yellow": (242, 212, 20),
    "black": (16, 16, 18),
    "orange": (246, 134, 18),
    "purple": (138, 42, 168),
}
SHAPES = ("circle", "square", "triangle", "diamond")
SLOTS = 4  # columns of a 14-pixel patch that the hint tells apart: no letter is narrower


@cache
def font_files() -> tuple[str, ...]:
    """Paths of the fonts at hand, "" for Pillow's own, in a fixed order."""
    found = [""]
    for package in FONT_PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            files = sorted([*Path(place).rglob("*.ttf"), *Path(place).rglob("*.otf")])
            found += [str(f) for f in files if f.stem.rpartition("-")[2] in FONT_STYLES]
    return tuple(found)


@cache
def font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def text_picture(
    text: str, grid: tuple[int, int], rng: np.random.Generator, largest: int = 38
) -> tuple[Image.Image, NDArray[np.int64]]:
    """The text somewhere in a picture that fills the grid, in a random font, size (15 to `largest`) and pair of colours.

    Also returns what lies where, the trainer's hint to the tower: for each slot, a quarter of a 14-pixel patch of the
    padded picture, the code of the character over its middle and which of the text's characters that is, counted
    from 1: [rows, columns, SLOTS, 2], 0 for none.
    """
    rows, columns = grid
    width, height = columns * 28 - int(rng.integers(28)), rows * 28 - int(rng.integers(8))
    path = font_files()[int(rng.integers(len(font_files())))]
    size = int(rng.integers(15, min(height, largest) + 1))
    while True:
        left, top, right, bottom = font(path, size).getbbox(text)
        if (right - left <= width - 2 and bottom - top <= height - 2) or size <= 9:
            break
        size -= 1
    dark, light = rng.integers(0, 90, 3), rng.integers(180, 256, 3)
    ink, paper = (dark, light) if rng.random() < 0.75 else (light, dark)
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in paper))
    x, y = (
        int(rng.integers(max(0, int(room)) + 1)) for room in (width - (right - left), height - (bottom - top))
    )
    draw = ImageDraw.Draw(picture)
    draw.text((x - left, y - top), text, tuple(int(v) for v in ink), font(path, size))
    hint = np.zeros((2 * rows, 2 * columns * SLOTS, 2), np.int64)
    lines = [i for i in range(2 * rows) if y - 5 < 14 * i + 7 < y + bottom - top + 5]
    edges = [x - left + font(path, size).getlength(text[:i]) for i in range(len(text) + 1)]
    for i, character in enumerate(text):
        for slot, middle in enumerate(_slot_middles(columns)):
            if edges[i] <= middle < edges[i + 1]:
                hint[lines, slot] = ord(character), i + 1
    return picture, hint.reshape(2 * rows, 2 * columns, SLOTS, 2)


def _slot_middles(columns: int) -> NDArray[np.float64]:
    """Where the middles of the slots of a row of `columns` tokens lie, in pixels."""
    return (np.arange(2 * columns * SLOTS) + 0.5) * 14 / SLOTS


def scene(
    colour: str, shape: str, count: int, grid: tuple[int, int], rng: np.random.Generator
) -> tuple[Image.Image, NDArray[np.int64]]:
    """`count` shapes of one kind and colour that do not touch.

    Also returns the hint of `text_picture`: no characters, and the number of the shape over each slot, counted from the top
    row down and from the left.
    """
    rows, columns = grid
    width, height = columns * 28 - int(rng.integers(14)), rows * 28 - int(rng.integers(14))
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(226, 256, 3)))
    draw = ImageDraw.Draw(picture)
    ink = tuple(int(np.clip(v + rng.integers(-14, 15), 0, 255)) for v in COLOURS[colour])
    boxes: list[tuple[float, float, float]] = []
    largest = min(width, height) / (2.2 if count == 1 else 2 + count**0.5)
    while len(boxes) < count:
        radius = float(rng.uniform(0.55, 1.0)) * largest / 2 + 4
        for _ in range(60):
            x, y = (float(rng.uniform(radius, side - radius)) for side in (width, height))
            if all(max(abs(x - a), abs(y - b)) > radius + r + 3 for a, b, r in boxes):
                boxes.append((x, y, radius))
                break
        else:  # no room: start again with smaller ones
            boxes.clear()
            largest *= 0.85
    for x, y, r in boxes:
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), ink)
        elif shape == "square":
            draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), ink)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], ink)
        else:
            draw.polygon([(x, y - r), (x + 0.8 * r, y), (x, y + r), (x - 0.8 * r, y)], ink)
    hint = np.zeros((2 * rows, 2 * columns * SLOTS, 2), np.int64)
    middles_y, middles_x = 14 * np.arange(2 * rows)[:, None] + 7, _slot_middles(columns)
    for number, (x, y, r) in enumerate(sorted(boxes, key=lambda box: (box[1] // 14, box[0])), 1):
        hint[(np.abs(middles_y - y) <= r) & (np.abs(middles_x - x) <= r), 1] = number
    return picture, hint.reshape(2 * rows, 2 * columns, SLOTS, 2)
