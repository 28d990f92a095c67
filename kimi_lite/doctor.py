"""Reports: what this machine offers and what is in use, and what a model file holds."""

import mmap
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

import kimi_lite
from kimi_lite.api import mmproj_beside, nano_path
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import LAYOUTS
from kimi_lite.runtime import dense, kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.cuda.find import find_device
from kimi_lite.runtime.image_cache import ImageCache, default_directory
from kimi_lite.runtime.llama_bindings import LLAMA, bindings
from kimi_lite.runtime.placement import gb
from kimi_lite.runtime.vision import ImageEncoder, open_vision
from kimi_lite.runtime.weights import Weights, open_weights

BEST_ISAS = ("avx512vnni", "zen4")


def machine_report() -> Iterator[str]:
    """Lines for `kimi-lite doctor`. Whatever could be faster and is not in use says so."""
    yield f"kimi-lite {kimi_lite.__version__}, Python {platform.python_version()}, {platform.platform()}"
    memory = psutil.virtual_memory()
    yield f"memory    {memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free"
    yield f"threads   {kernels.default_threads()} by default, {psutil.cpu_count()} logical processors"
    isas = kernels.usable_isas()
    yield f"kernels   {kernels.isa()} in use; usable here: {', '.join(isas)}"
    if kernels.isa() != isas[0]:
        yield f"          not the fastest: KIMI_LITE_ISA holds it at {kernels.isa()}, {isas[0]} would run"
    elif isas[0] not in BEST_ISAS:
        yield f"          this processor has no {BEST_ISAS[0]}, for which the fastest kernels are written"
    if hasattr(mmap, "MADV_HUGEPAGE") and Path("/sys/kernel/mm/transparent_hugepage").exists():
        yield "pages     large ones are asked for; kimi-lite bench MODEL says which share of a file lies in them"
    else:
        yield "pages     not in use: large ones, which this system has none of for files; they would decode a tenth faster"
    card, graphics = _graphics()
    yield graphics
    yield "guesses   text that repeats itself is guessed and checked in one step, on the CPU" + (
        "; not in use on a card (--vram 0 is the CPU)" if card else ""
    )
    yield _gpu_dense()
    directory = default_directory()
    where = "on the card as far as its memory has room, else " if card else ""
    yield f"pictures  {where}on the same kernels; encoded ones are kept in {directory or 'memory only'}"
    for package, extra, what in (
        ("pypdfium2", "pdf", "PDF pages"),
        ("av", "video", "video frames"),
        ("pillow_heif", "heic", "HEIC photographs"),
    ):
        if find_spec(package) is None:
            yield f"          not in use: {what}, which need pip install 'kimi-lite[{extra}]'"
    yield from llama_report()
    missing = [name for name in ("msgspec", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        yield f"server    not in use: kimi-lite serve needs {', '.join(missing)}; pip install 'kimi-lite[serve]'"
    else:
        yield "server    kimi-lite serve MODEL answers programs that speak OpenAI's chat completions"
    for package in (
        "numpy",
        "gguf",
        "tiktoken",
        "pillow",
        "pypdfium2",
        "av",
        "pillow_heif",
        "torch",
        "bitsandbytes",
    ):
        if find_spec({"pillow": "PIL"}.get(package, package)) is None:
            continue
        try:
            yield f"package   {package} {version(package.replace('_', '-'))}"
        except PackageNotFoundError:
            yield f"package   {package}"
    try:
        yield f"nano      {nano_path()}"
    except kimi_lite.ModelFileError as error:
        yield f"nano      {error}"


def _graphics() -> tuple[bool, str]:
    """Whether a card is in use, and a line about it."""
    try:
        device = find_device()
        free = device.free_bytes()
        device.close()
    except kimi_lite.KimiLiteError as error:
        return False, f"graphics  not in use: {error}"
    return True, f"graphics  {device.name}, {gb(free)} free; in use unless --vram 0"


def _gpu_dense() -> str:
    """What --gpu-dense would run on; asked without importing PyTorch."""
    if why := dense.why_not():
        return f"gpu-dense not in use: {why}"
    return "gpu-dense bitsandbytes is here for --gpu-dense, whose products differ from the CPU's; in use only if asked for"


def llama_report() -> Iterator[str]:
    """What --engine llama.cpp would run on."""
    try:
        llama = bindings(LLAMA)
    except kimi_lite.UsageError as error:
        yield f"llama.cpp not in use: {error}"
        return
    devices = ", ".join(llama.devices()) or "devices unknown"
    yield f"llama.cpp {llama.name} {llama.version} for --engine llama.cpp: {devices}"
    if not llama.offloads():
        yield "          no graphics card: it was built without a backend for one, or found none"
    yield "          pictures reach it from kimi-lite's own image tower, on the CPU"


def file_report(path: Path) -> Iterator[str]:
    """Lines for `kimi-lite info`. Raises ModelFileError as opening the file to run it would."""
    weights = open_weights(path, pack=False)
    file, c = GgufFile(path), weights.config
    packed = dict(
        zip(
            file.metadata.get("kimi_lite.packed.name", []),
            file.metadata.get("kimi_lite.packed.layout", []),
            strict=True,
        )
    )
    yield f"{path}: {file.metadata.get('general.name', 'unnamed')}, {weights.n_bytes / 1e9:.3f} GB"
    yield f"layers    {c.n_layers} ({c.n_dense_layers} dense), hidden {c.hidden_size}, vocabulary {c.vocab_size}"
    yield f"experts   {c.n_active} of {c.n_experts} a token, {c.n_shared} shared, width {c.expert_hidden_size}"
    yield (
        f"heads     {c.n_heads} of {c.nope_dim} + {c.rope_dim}, values {c.value_dim}, latent {c.kv_rank}, "
        f"rope theta {c.rope_theta:g}"
    )
    yield f"pictures  {_image_side(weights)}"
    per_token = LatentCache.bytes_per_token(c)
    yield f"context   {c.context_length} tokens, {per_token / 1e3:.1f} kB of cache each"
    yield f"decoding  reads {weights.step_bytes(1) / 1e9:.3f} GB a token"
    counts, sizes = Counter[str](), Counter[str]()
    for name, tensor in file.tensors.items():
        kind = packed.get(name, tensor.type)
        counts[kind] += 1
        sizes[kind] += tensor.data.size
    for kind, size in sizes.most_common():
        form = LAYOUTS.get(kind)
        bits = f", {form.bits_per_weight:g} bits a weight" if form else ""
        yield f"  {kind:8} {counts[kind]:5} tensors {size / 1e9:9.3f} GB{bits}"


def _image_side(weights: Weights) -> str:
    """Whether pictures work, and from where; what would stop the first one is raised here."""
    beside = mmproj_beside(weights.path)
    side = beside if beside.exists() else weights.image_side
    if side is None:
        return f"none: the file holds no image side, and {beside.name} is not beside it"
    encoder = ImageEncoder(side, weights.config.hidden_size, ImageCache(None))
    if side is weights.image_side:
        open_vision(side)  # an mmproj file would be packed for that, which takes seconds
    where = "this file" if side is weights.image_side else f"{beside.name} beside it"
    return f"in {where}, up to {encoder.image.token_limit // 4} tokens each before padding"
