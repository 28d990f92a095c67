"""The device program: its source, what its kernels take, and the compiled form, made once for a card and then kept.

The five `.cu` files are one program, compiled by NVRTC on the user's machine: no nvcc, no C compiler, no toolkit. NVRTC
is looked for where pip puts it (`nvidia-cuda-nvrtc`, which PyTorch brings as well) and then where the system has it.
Compiling takes some seconds, so the result is kept in the user's cache directory under a name made of the source, the
card's compute capability and the compiler's version. An entry is written aside and renamed, carries its own SHA-256,
and may be deleted at any time; one that is damaged counts as absent. KIMI_LITE_KERNEL_CACHE names another directory,
or is `off`.

What a kernel takes is read from the source, so that the host cannot pass anything else.
"""

import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kimi_lite.errors import KimiLiteError
from kimi_lite.runtime.directories import cache_directory, written

FILES = ("arithmetic.cu", "products.cu", "attention.cu", "experts.cu", "vision.cu")  # in the order of reading
# The CPU engine's bits: no contraction, IEEE division and roots, subnormal numbers kept.
OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
ON_ALL_CORES = "--split-compile=0"
KNOWN_SINCE = (12, 1)  # the version of NVRTC that first compiles on several cores
OLDEST = 75  # compute capability times ten of Turing; the program is compiled for this and newer


class NoCompilerError(KimiLiteError):
    """NVRTC is missing, or too old for the card."""


class Matrix(ctypes.Structure):
    """A packed matrix on the card; `stride` bytes from row block to row block."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("form", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("stride", ctypes.c_int),
    )


class Rows(ctypes.Structure):
    """Quantized rows on the card, `groups` groups of 32 channels each."""

    _fields_ = (
        ("q", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("sum", ctypes.c_uint64),
        ("groups", ctypes.c_int),
    )


class Cache(ctypes.Structure):
    """One layer's latent cache on the card."""

    _fields_ = (
        ("rows", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("context", ctypes.c_int),
        ("C", ctypes.c_int),
        ("R", ctypes.c_int),
    )


class Mlps(ctypes.Structure):
    """One layer's experts on the card: the table of the routed ones' addresses, and the shared MLP."""

    _fields_ = (
        ("experts", ctypes.c_uint64),
        ("shared", ctypes.c_uint64),
        ("form", ctypes.c_int),
        ("F", ctypes.c_int),
        ("shared_form", ctypes.c_int),
        ("shared_F", ctypes.c_int),
        ("D", ctypes.c_int),
        ("A", ctypes.c_int),
    )


class Patches(ctypes.Structure):
    """One picture's queries, keys and values on the card: N patches, H heads of K channels."""

    _fields_ = (
        ("q", ctypes.c_uint64),
        ("k", ctypes.c_uint64),
        ("v", ctypes.c_uint64),
        ("q_scale", ctypes.c_uint64),
        ("k_scale", ctypes.c_uint64),
        ("v_scale", ctypes.c_uint64),
        ("N", ctypes.c_int),
        ("H", ctypes.c_int),
        ("K", ctypes.c_int),
        ("Np", ctypes.c_int),
        ("Kp", ctypes.c_int),
    )


_BY_VALUE: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "u64": ctypes.c_uint64,
    **{struct.__name__: struct for struct in (Matrix, Rows, Cache, Mlps, Patches)},
}


@cache
def source() -> str:
    """The whole program."""
    parts = []
    for name in FILES:
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        parts.append(f'#line 1 "{name}"\n{text}')
    return "".join(parts)


@cache
def signatures() -> dict[str, tuple[Any, ...]]:
    """What each kernel takes, as ctypes: a pointer is the address of device memory."""
    kernels = {}
    for name, parameters in re.findall(r"^KERNEL\w* (\w+)\(([^)]*)\)", source(), re.MULTILINE):
        kinds = [parameter.split()[:-1] for parameter in parameters.split(",")]
        kernels[name] = tuple(
            ctypes.c_uint64 if kind[-1].endswith("*") else _BY_VALUE[kind[-1]] for kind in kinds
        )
    return kernels


class Nvrtc:
    """The run-time compiler's library."""

    def __init__(self, library: str | None = None, driver_cuda: tuple[int, int] | None = None) -> None:
        """Load `library`, or the newest found whose code a driver for CUDA `driver_cuda` takes.

        Raises NoCompilerError if there is none.
        """
        self.path = library or _find(driver_cuda)
        try:
            self._library = ctypes.CDLL(self.path)
        except OSError as error:
            raise NoCompilerError(f"{self.path}: NVRTC does not load ({error}); install it again") from error
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def targets(self) -> list[int]:
        """Compute capabilities, times ten, that it compiles for."""
        n = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(n))
        found = (ctypes.c_int * n.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def target_for(self, capability: int) -> int:
        """The newest target whose code runs on a card of this compute capability (times ten): never across majors.

        Raises NoCompilerError for a card that is too old for the kernels, or too new for the compiler.
        """
        if capability < OLDEST:
            raise NoCompilerError(
                f"the card has compute capability {capability / 10}; kimi-lite's kernels need {OLDEST / 10} "
                "(GeForce RTX 20 or GTX 16, since 2018) or newer: run on the CPU instead"
            )
        fitting = [t for t in self.targets() if t // 10 == capability // 10 and t <= capability]
        if not fitting:
            raise NoCompilerError(
                f"{self.path}: NVRTC {self.version[0]}.{self.version[1]} compiles for no card of compute capability "
                f"{capability / 10}; install a newer one: pip install -U nvidia-cuda-nvrtc"
            )
        return max(fitting)

    def compile(self, text: str, target: int) -> bytes:
        """Machine code (a cubin) for one compute capability, times ten. Raises KimiLiteError with the compiler's words."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        try:
            options = [f"--gpu-architecture=sm_{target}", *OPTIONS]
            if self.version >= KNOWN_SINCE:
                options.append(ON_ALL_CORES)
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), array)
            if code:
                log = self._bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
                words = log.rstrip(b"\0").decode(errors="replace").strip()
                raise KimiLiteError(f"the GPU kernels do not compile for sm_{target}: {words}")
            return self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, size_of: str, content_of: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(content_of, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise KimiLiteError(
                f"{self.path}: {name} failed: {self._library.nvrtcGetErrorString(code).decode()}"
            )


def _find(driver_cuda: tuple[int, int] | None) -> str:
    """The library's path: the newest fitting one that pip installed beside us, or the system's.

    A driver runs machine code of its own major version of CUDA and of older ones.
    """
    pattern = "nvrtc64*.dll" if sys.platform == "win32" else "libnvrtc.so.*"
    found = dict[Path, int]()  # major version
    for package in ("nvidia", "torch"):  # on Windows, PyTorch carries it in torch/lib
        spec = importlib.util.find_spec(package)  # finds the folder; imports nothing
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for place in ("lib", "*/lib", "*/bin", "*/bin/x86_64"):
                for path in Path(folder).glob(f"{place}/{pattern}"):
                    version = re.search(
                        r"(?:\.so\.|nvrtc64_)(\d\d)", path.name
                    )  # libnvrtc.so.13, nvrtc64_130_0.dll
                    if version and ".alt." not in path.name:
                        found[path] = int(version[1])
    fitting = {path: major for path, major in found.items() if driver_cuda is None or major <= driver_cuda[0]}
    if fitting:
        return str(max(fitting, key=lambda path: fitting[path]))
    system = ctypes.util.find_library("nvrtc")
    if system:
        return system
    if found and driver_cuda:
        raise NoCompilerError(
            f"the driver supports CUDA {driver_cuda[0]}.{driver_cuda[1]}, but NVRTC is here for CUDA "
            f"{min(found.values())} only; update the driver, or pip install nvidia-cuda-nvrtc-cu{driver_cuda[0]}"
        )
    raise NoCompilerError(
        "the GPU kernels are compiled by NVRTC, which is not installed: pip install nvidia-cuda-nvrtc"
    )


@dataclass(frozen=True)
class Program:
    """Machine code for one card."""

    cubin: bytes
    from_cache: bool


def kernel_directory() -> Path | None:
    """Where compiled programs are kept: the user's cache directory, KIMI_LITE_KERNEL_CACHE, or nowhere."""
    return cache_directory("kernels", "KIMI_LITE_KERNEL_CACHE")


def compiled(capability: int, nvrtc: Nvrtc) -> Program:
    """The program for a card of this compute capability (times ten), from the cache or from the compiler."""
    target = nvrtc.target_for(capability)
    what = "\n".join((source(), *OPTIONS, str(target), str(nvrtc.version)))
    folder = kernel_directory()
    path = folder and folder / f"{hashlib.sha256(what.encode()).hexdigest()}.cubin"
    cubin = _read(path)
    if cubin is not None:
        return Program(cubin, True)
    cubin = nvrtc.compile(source(), target)
    _write(path, cubin)
    return Program(cubin, False)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path | None, cubin: bytes) -> None:
    """Trouble with the disk costs a compilation at the next start, nothing else."""
    if path is None:
        return
    with contextlib.suppress(OSError), written(path) as file:
        file.write(hashlib.sha256(cubin).digest() + cubin)
