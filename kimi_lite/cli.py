"""The command line. Each command turns its options into one call that the Python interface offers as well.

Heavy modules are imported inside the commands, so that `--help` stays instant. Standard output carries the answer and
nothing else; thinking, statistics, progress and warnings go to standard error.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_lite.errors import UsageError
from kimi_lite.options import (
    Budget,
    Context,
    EngineName,
    GpuDense,
    GpuLayers,
    MaxImageTokens,
    MaxTokens,
    Mmproj,
    Model,
    Offline,
    Raw,
    Seed,
    System,
    Temperature,
    Threads,
    TopP,
    Vram,
)
from kimi_lite.runtime.speeds import ASSUMED
from kimi_lite.terminal import visible

if TYPE_CHECKING:
    from kimi_lite.api import Model as OpenModel
    from kimi_lite.api import TokenLogprob
    from kimi_lite.quantize.calibrate import Passage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Kimi-VL-A3B, whole and faithful, on a laptop CPU or one graphics card.",
)

REAL_MODEL = (
    "kimi-lite: no model was named, so this is kimi-vl-nano, a toy for trying things out. For the real one: "
    "hf download moonshotai/Kimi-VL-A3B-Thinking-2506 --local-dir DIR, then kimi-lite quantize DIR model.gguf"
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import kimi_lite

        print(kimi_lite.__version__)
        raise typer.Exit


@app.command()
def ask(
    this: typer.Context,
    question: Annotated[
        str | None, typer.Argument(help="The question; standard input, if piped, stands before it.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="A packed int4 or GGUF file; without it, the small kimi-vl-nano."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="A picture: file, URL, data URI or - for standard input; FILE.pdf#pages=2-4, FILE.mp4#frames=8. "
            "Repeat it for several."
        ),
    ] = None,
    mmproj: Mmproj = None,
    max_image_tokens: MaxImageTokens = None,
    offline: Offline = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    thinking_budget: Budget = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    schema: Annotated[
        str | None,
        typer.Option(help="The answer is JSON of this JSON Schema: a file, or the schema itself."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The answer matches this regular expression as a whole.")
    ] = None,
    context: Context = None,
    threads: Threads = None,
    vram: Vram = None,
    engine: EngineName = "kimi-lite",
    gpu_layers: GpuLayers = None,
    gpu_dense: GpuDense = None,
    show_thinking: Annotated[
        bool | None,
        typer.Option(
            "--show-thinking/--hide-thinking",
            help="Thinking on standard error; by default only on a terminal.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer, thinking, reason and statistics as one JSON object.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: every token with its log-probability, and so many of the likeliest beside it."
        ),
    ] = None,
    raw: Raw = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer and errors.")] = False,
) -> None:
    """Ask one question and print the answer.

    Exit code 7: the answer was cut off by --max-tokens or the context before it was complete.
    """
    images = image or []
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs are part of what --json prints; give both")
    if images.count("-") > 1:
        raise UsageError("--image - reads standard input, which holds one picture; it was given twice")
    if "-" not in images and not sys.stdin.isatty() and (piped := _stdin()):
        question = f"{piped}\n{question}" if question else piped
    if not question:
        raise UsageError('no question; give one: kimi-lite ask "What is 38 + 47?", or pipe text in')
    schema = None if schema is None else _schema_text(schema)
    from kimi_lite.api import read_data
    from kimi_lite.runtime.sampling import SamplingOptions

    opened = _open(this, offline, quiet)
    opened.conversation.system = system
    dim = show_thinking if show_thinking is not None else sys.stderr.isatty()
    from kimi_lite.chat import Printer

    printer = Printer(
        sys.stdout,
        sys.stderr,
        show_thinking=dim and not as_json and not quiet,
        show_answer=not as_json,
        raw=raw or schema is not None or regex is not None,
    )
    options = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
    with printer.progress() as on_progress:
        events = opened.chat(
            question,
            images=images,
            options=options,
            max_tokens=max_tokens,
            thinking_budget=thinking_budget,
            schema=schema,
            regex=regex,
            logprobs=logprobs,
            on_progress=None if quiet else on_progress,
            on_image_progress=None if quiet else printer.image_progress,
        )
        try:
            for event in events:
                printer.show(event)
        finally:
            printer.end()
    done = printer.done
    assert done is not None
    assert done.stats is not None
    if as_json:
        reply: dict[str, object] = {
            "schema": "kimi-lite/1",
            "answer": printer.answer,
            "thinking": printer.thinking,
            "reason": done.reason,
            "prompt_tokens": done.stats.prompt_tokens,
            "tokens": done.stats.tokens,
        }
        if schema is not None:
            reply["data"] = read_data(schema, printer.answer, done.reason)
        if done.stats.gpu_dense:
            reply["gpu_dense"] = done.stats.gpu_dense
        if done.logprobs is not None:
            reply["logprobs"] = [
                {**_logprob(token), "top": list(map(_logprob, token.top))} for token in done.logprobs
            ]
        print(json.dumps(reply, ensure_ascii=False))
    elif not quiet:
        printer.statistics(done.stats)
    if done.reason in ("length", "context"):
        where = (
            "inside its thinking, so there is no answer" if not printer.answer else "before it was complete"
        )
        limit = "--max-tokens" if done.reason == "length" else "--context"
        print(f"kimi-lite: the reply was cut off {where}; raise {limit}", file=sys.stderr)
        raise typer.Exit(7)


def _logprob(token: "TokenLogprob") -> dict[str, object]:
    """Bytes as well as text: a token may be part of a character."""
    return {
        "id": token.id,
        "text": token.bytes.decode(errors="replace"),
        "bytes": list(token.bytes),
        "logprob": token.logprob,
    }


def _open(this: typer.Context, offline: bool, quiet: bool = False) -> "OpenModel":
    """The model that a command's options name, with a word about which it is and where it runs, unless that is the CPU."""
    from kimi_lite.api import load

    given = this.params
    if given["model"] is None and not quiet:
        print(REAL_MODEL, file=sys.stderr)
    names = "mmproj context threads vram max_image_tokens engine gpu_layers gpu_dense".split()
    opened = load(given["model"], offline=offline, **{name: given[name] for name in names})
    if opened.engine.placement != "the CPU" and not quiet:
        print(f"kimi-lite: runs on {opened.engine.placement}", file=sys.stderr)
    return opened


def _schema_text(given: str) -> str:
    """The schema itself, or what the file of that name holds."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        said = f"--schema {given!r} cannot be read ({error.strerror})"
    except ValueError:
        said = f"--schema {given!r} is not UTF-8 text"
    raise UsageError(f"{said}; give a file that holds a JSON Schema, or the schema itself")


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text") from None


@app.command()
def chat(
    this: typer.Context,
    model: Model = None,
    mmproj: Mmproj = None,
    max_image_tokens: MaxImageTokens = None,
    offline: Offline = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    thinking_budget: Budget = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    vram: Vram = None,
    engine: EngineName = "kimi-lite",
    gpu_layers: GpuLayers = None,
    gpu_dense: GpuDense = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    hide_thinking: Annotated[
        bool, typer.Option("--hide-thinking", help="Do not print the thinking.")
    ] = False,
    raw: Raw = False,
) -> None:
    """Talk in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands."""
    if not sys.stdin.isatty():
        raise UsageError('chat needs a terminal; for scripts use `kimi-lite ask "…"`')
    if resume is not None and system is not None:
        raise UsageError("--resume brings the conversation's own system message; leave --system away")
    from kimi_lite.chat import Session
    from kimi_lite.runtime.sampling import SamplingOptions

    options = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
    opened = _open(this, offline)
    opened.conversation.system = system
    session = Session(opened, options, max_tokens, thinking_budget, show_thinking=not hide_thinking, raw=raw)
    if resume is not None:
        session.load(resume)
    session.run()


@app.command()
def serve(
    this: typer.Context,
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; one that other machines reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Requests must carry the key in this file; by default KIMI_LITE_API_KEY, if it is set."
        ),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch pictures that requests name by their URL on the web.")
    ] = False,
    mmproj: Mmproj = None,
    max_image_tokens: MaxImageTokens = None,
    max_tokens: MaxTokens = None,
    thinking_budget: Budget = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    context: Context = None,
    cache_ram: Annotated[
        str | None,
        typer.Option(
            help="Memory for conversations that others have pushed out, so that they are not read again; by default 512M. On the "
            "CPU alone."
        ),
    ] = None,
    threads: Threads = None,
    vram: Vram = None,
    engine: EngineName = "kimi-lite",
    gpu_layers: GpuLayers = None,
    gpu_dense: GpuDense = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No line for each answer.")] = False,
) -> None:
    """Answer programs that speak OpenAI's chat completions, over HTTP.

    Sampling and limits are what a request gets that does not say.
    """
    try:
        from kimi_lite.server import Service, listen, read_key
        from kimi_lite.server import serve as answer
    except ModuleNotFoundError as error:
        raise UsageError(f"serve needs {error.name}; pip install 'kimi-lite[serve]'") from None
    from kimi_lite.runtime.sampling import SamplingOptions

    key, ram = read_key(api_key_file), _size(cache_ram, "--cache-ram")
    options = SamplingOptions(temperature=temperature, top_p=top_p)
    with listen(host, port, key) as listening:  # before the model, which takes longer
        opened = _open(this, offline=not fetch)
        service = Service(opened, key, fetch, options, max_tokens, thinking_budget, quiet, ram)
        name, at = listening.getsockname()[:2]
        where = f"http://{f'[{name}]' if ':' in name else name}:{at}/v1"
        print(f"kimi-lite: {service.name} answers at {where}, until Ctrl-C", file=sys.stderr, flush=True)
        answer(service, listening)


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a downloaded checkpoint.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write; GGUF has the weights for pictures beside it, as …-mmproj.gguf; compressed-tensors is a "
            "directory."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="int4 (packed), int3 (its routed experts in 3 bits), or GGUF as q8_0, q4_0, bf16 or f16."
        ),
    ] = "int4",
    format: Annotated[
        str | None,
        typer.Option(
            help="int4, int3 or gguf; follows from --to. Or compressed-tensors: --to int4 as a checkpoint again, for vLLM and "
            "SGLang."
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<path>",
            help="Round int4 or int3 for text and pictures like your own: a file, or a folder of them; repeat it for "
            "several. Slower, and closer to the published model.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the file back and report the error per tensor.")
    ] = False,
) -> None:
    """Turn a published checkpoint, in bf16 or in compressed-tensors' 4 bits, into one file that runs."""
    from kimi_lite.quantize.convert import quantize as convert

    def sample() -> "list[Passage]":
        from kimi_lite.sample import passages

        return passages(checkpoint, calibrate or [], out.parent)

    with _progress("reading the checkpoint") as progress:
        result = convert(
            checkpoint,
            out,
            to=to,  # type: ignore[arg-type]
            format=format,
            sample=sample if calibrate else None,
            progress=progress,
        )
    for path in result.paths:
        print(path)
    print(
        f"{result.n_bytes / 1e9:.2f} GB in {result.seconds:.0f} s, {result.bits_per_weight:.2f} bits a weight",
        file=sys.stderr,
    )
    if verify:
        from kimi_lite.quantize.verify import tensor_errors

        for name, error in tensor_errors(checkpoint, out):
            print(f"{error:8.4%}  {name}", file=sys.stderr)


@app.command()
def pack(
    model: Annotated[
        Path,
        typer.Argument(help="A standard GGUF file of this model, or a packed one without an image side."),
    ],
    out: Annotated[Path, typer.Argument(help="The packed file to write.")],
    mmproj: Annotated[
        Path | None,
        typer.Option(help="The image side to put inside; by default MODEL-mmproj.gguf beside MODEL.gguf."),
    ] = None,
) -> None:
    """Pack a standard GGUF and its image side once for all: the same weights in one file, ready to be mapped."""
    from kimi_lite.pack import pack as write_packed

    with _progress("reading the file") as progress:
        n_bytes = write_packed(model, out, progress, mmproj=mmproj)
    print(out)
    print(f"{n_bytes / 1e9:.2f} GB", file=sys.stderr)


@contextmanager
def _progress(beginning: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal: name, bytes done, in all. None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(beginning, total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


@app.command()
def info(model: Annotated[Path, typer.Argument(help="A packed int4 or GGUF file.")]) -> None:
    """Say what a model file holds."""
    from kimi_lite.doctor import file_report

    for line in file_report(model):
        print(visible(line))


@app.command()
def bench(
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt lengths to prefill.  [default: 256,2048]", show_default=False)
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(help="Depths to decode at, in tokens.  [default: 0,4096]", show_default=False),
    ] = None,
    decode: Annotated[int, typer.Option(help="Tokens to decode at each depth.")] = 32,
    threads: Annotated[
        str | None,
        typer.Option(help="CPU threads, or several numbers, such as 1,2; by default one per core."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context to reserve; by default what the rows need.")
    ] = None,
    vram: Vram = None,
    gpu_dense: GpuDense = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """Measure prefill and decoding, against how fast this machine can read the model's bytes."""
    from kimi_lite.api import nano_path
    from kimi_lite.bench import measure, table

    if model is None:
        print(REAL_MODEL, file=sys.stderr)
    report = measure(
        model or nano_path(),
        prompts=_numbers("--prompt", prompt, 1),
        depths=_numbers("--depth", depth, 0),
        decode=decode,
        threads=_numbers("--threads", threads, 1) or (None,),
        context=context,
        vram=_size(vram),
        gpu_dense=gpu_dense,
        progress=lambda text: print(f"{text} …", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        print("\n".join(table(report)))


def _size(text: str | None, said_by: str = "--vram") -> int | None:
    from kimi_lite.runtime.placement import parse_size

    return None if text is None else parse_size(text, said_by)


def _numbers(option: str, text: str | None, least: int) -> list[int] | None:
    """A list of whole numbers as a person writes it; None if the option was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise UsageError(f"{option} is {text!r}; give whole numbers from {least} up, separated by commas")
    return [int(part) for part in parts]


@app.command()
def plan(
    model: Model = None,
    vram: Vram = None,
    gpu_dense: GpuDense = None,
    context: Context = None,
    threads: Threads = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the CPU on real layers, and the whole where it runs here."),
    ] = False,
    cpu_read: Annotated[float, typer.Option(help="GB/s at which the CPU reads experts.")] = ASSUMED.cpu_gb_s,
    cpu_products: Annotated[float, typer.Option(help="GMAC/s of the CPU in prefill.")] = ASSUMED.cpu_gmac_s,
    card_read: Annotated[float, typer.Option(help="GB/s of the card's memory.")] = ASSUMED.card_gb_s,
    card_products: Annotated[float, typer.Option(help="GMAC/s of the card.")] = ASSUMED.card_gmac_s,
    pcie: Annotated[float, typer.Option(help="GB/s between processor and card.")] = ASSUMED.pcie_gb_s,
    launch: Annotated[
        float, typer.Option(help="Microseconds that starting a kernel costs.")
    ] = ASSUMED.launch_us,
    hand_off: Annotated[
        float, typer.Option(help="Microseconds until the other side, CPU or card, knows.")
    ] = ASSUMED.hand_off_us,
    copy: Annotated[
        float,
        typer.Option(
            help="GB/s at which experts that are streamed to the card are copied from the file's pages."
        ),
    ] = ASSUMED.copy_gb_s,
) -> None:
    """Say what would go on a card, why, and how fast that should be.

    Without a card, --vram assumes one. Speeds are assumed, and can be set here, but for what --measure finds out.
    """
    from kimi_lite.api import nano_path
    from kimi_lite.plan import plan_report
    from kimi_lite.runtime import kernels
    from kimi_lite.runtime.speeds import Speeds

    kernels.set_threads(threads)
    speeds = Speeds(cpu_read, cpu_products, card_read, card_products, pcie, launch, hand_off, copy)
    if model is None:
        print(REAL_MODEL, file=sys.stderr)
    lines = plan_report(
        model or nano_path(),
        vram=_size(vram),
        gpu_dense=gpu_dense,
        context=context,
        speeds=speeds,
        measure=measure,
    )
    for line in lines:
        print(line)


@app.command()
def doctor() -> None:
    """Say what this machine offers and what kimi-lite uses of it."""
    from kimi_lite.doctor import machine_report

    for line in machine_report():
        print(line)
