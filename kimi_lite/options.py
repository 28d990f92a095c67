"""Options that several commands share: their types, and what `--help` says of them."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None, typer.Argument(help="A packed int4 or GGUF file; without it, the small kimi-vl-nano.")
]
Context = Annotated[int | None, typer.Option(help="Tokens of context to reserve; by default up to 32768.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default one per physical core.")]
Vram = Annotated[
    str | None,
    typer.Option(
        help="Take at most this much of a graphics card's memory: 8G, 800M, or 0 for the CPU alone; by default a card "
        "is used if one works."
    ),
]
GpuDense = Annotated[
    str | None,
    typer.Option(
        help="Multiply the dense weights on the card by bitsandbytes, in nf4, int8 or bf16; by default our own kernels "
        "multiply the file's."
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 repeats exactly; the makers recommend 0.6 to 0.8 for Thinking.")
]
TopP = Annotated[
    float, typer.Option(help="Draw from the most likely tokens that together have this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Repeats a draw at a temperature above 0.")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens, thinking included.")]
Budget = Annotated[int | None, typer.Option(help="Close the thinking after this many tokens and answer.")]
Mmproj = Annotated[
    Path | None,
    typer.Option(
        help="The file with the image side; by default MODEL-mmproj.gguf beside MODEL.gguf, or else MODEL.gguf itself."
    ),
]
MaxImageTokens = Annotated[
    int | None, typer.Option(help="At most this many tokens a picture: less detail, less time.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Fetch no pictures from the web.")]
EngineName = Annotated[
    str, typer.Option(help="kimi-lite, or llama.cpp for standard GGUF files on any card that it drives.")
]
GpuLayers = Annotated[
    int | None, typer.Option(help="With llama.cpp: layers on the graphics card; by default all.")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Print answers without styling their Markdown on a terminal.")
]
System = Annotated[str | None, typer.Option(help="Replaces the default system message.")]
