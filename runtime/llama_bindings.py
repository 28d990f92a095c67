"""llama.cpp as a shared library: the Python bindings that are installed, opened late, kept quiet, in one shape.

`llama-cpp-python` (module `llama_cpp`) wraps llama.cpp's C interface with ctypes, for whichever graphics backend it was
built with: Metal, Vulkan, ROCm, CUDA, or none. `ik-llama-cpp-python` (`ik_llama_cpp`) wraps ik_llama.cpp, a fork for
CPUs, with nearly the same calls; where the two differ, `Bindings` hides it. Only their thin layer of functions and
structures is used, and of the structures only fields that every version has.

llama.cpp logs every step of a load. All of it is taken in here, for this process; errors are kept for the sentence that
explains a failure. (The fork prints a few lines of its own past its log; no command uses it.)
"""

import ctypes
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

from kimi_lite.errors import UsageError

LLAMA, IK_LLAMA = "llama_cpp", "ik_llama_cpp"
TESTED = {LLAMA: "0.3.36", IK_LLAMA: "0.1.5"}
LOW_LEVEL = {LLAMA: "llama_cpp.llama_cpp", IK_LLAMA: "ik_llama_cpp._ctypes_api"}
MINIMUM = {LLAMA: (0, 3, 16), IK_LLAMA: (0, 1, 5)}  # the first with Kimi's vocabulary that was looked at
INSTALL = {LLAMA: "pip install 'kimi-lite[llama]'", IK_LLAMA: "pip install ik-llama-cpp-python"}
ERROR = 4  # of ggml's log levels
ALL_LAYERS = 999  # more than any model has: llama.cpp's way of saying "all"

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@cache
def bindings(package: str) -> "Bindings":
    """The one `Bindings` of a package: the library keeps a pointer into it as long as the process lives."""
    return Bindings(package)


class Bindings:
    """One opened library, made by `bindings`. `api` has llama.cpp's functions and structures by their C names."""

    def __init__(self, package: str = LLAMA) -> None:
        """Open the library behind `llama_cpp` or `ik_llama_cpp`.

        Raises:
            UsageError: the package is missing, too old, or its library cannot be opened.
        """
        self.package, self.name = package, package.replace("_", "-").replace("llama-cpp", "llama-cpp-python")
        try:
            self.version = str(getattr(import_module(package), "__version__", "0"))
            if tuple(int(n) for n in re.findall(r"\d+", self.version)[:3]) < MINIMUM[package]:
                raise self._too_old()
            self.api: Any = import_module(LOW_LEVEL[package])
            self._library: Any = self.api._lib
            self._declare()
        except ModuleNotFoundError as error:
            if error.name != package:
                raise self._broken(error) from None
            raise UsageError(
                f"--engine llama.cpp needs the package {self.name}, which is not installed: {INSTALL[package]} "
                "(docs/llama-engine.md says how to build it for a graphics card)"
            ) from None
        except AttributeError as error:
            raise UsageError(
                f"{self.name} {self.version} lacks a function that --engine llama.cpp calls ({error}); versions up to "
                f"{TESTED[package]} have it: pip install '{self.name}=={TESTED[package]}'"
            ) from None
        except (OSError, RuntimeError) as error:
            raise self._broken(error) from None
        self.errors: deque[str] = deque(maxlen=20)
        self._callback = _LogCallback(self._log)
        self._library.llama_log_set(self._callback, None)  # first: finding the devices logs too
        self.api.llama_backend_init()

    def _declare(self) -> None:
        """Prototypes of the calls that one of the packages leaves out, or names otherwise."""
        declare(self._library.llama_log_set, None, _LogCallback, ctypes.c_void_p)
        declare(self._library.llama_supports_gpu_offload, ctypes.c_bool)
        self._remove: Callable[[int, int], bool]
        if self.package == IK_LLAMA:
            self.free_model = self.api.llama_free_model
            seq_rm = self._library.llama_kv_cache_seq_rm
            declare(seq_rm, ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
            self._remove = lambda context, start: seq_rm(context, 0, start, -1)
        else:
            self.free_model = self.api.llama_model_free
            memory, seq_rm = self.api.llama_get_memory, self.api.llama_memory_seq_rm
            self._remove = lambda context, start: seq_rm(memory(context), 0, start, -1)

    def forget(self, context: int, start: int) -> None:
        """Remove all positions from `start` on from a context's cache."""
        removed = self._remove(context, start)
        assert removed, f"llama.cpp keeps positions after {start}"

    def offloads(self) -> bool:
        """Whether this build has a graphics backend and a device for it."""
        return bool(self._library.llama_supports_gpu_offload())

    def devices(self) -> Iterator[str]:
        """What llama.cpp can compute on, as it names it. Nothing where the build does not tell."""
        library = self._library
        if not hasattr(library, "ggml_backend_dev_count"):
            return
        declare(library.ggml_backend_dev_count, ctypes.c_size_t)
        declare(library.ggml_backend_dev_get, ctypes.c_void_p, ctypes.c_size_t)
        declare(library.ggml_backend_dev_name, ctypes.c_char_p, ctypes.c_void_p)
        declare(library.ggml_backend_dev_description, ctypes.c_char_p, ctypes.c_void_p)
        for i in range(library.ggml_backend_dev_count()):
            device = library.ggml_backend_dev_get(i)
            name, what = library.ggml_backend_dev_name(device), library.ggml_backend_dev_description(device)
            yield f"{name.decode('utf-8', 'replace')} ({what.decode('utf-8', 'replace').strip()})"

    def reason(self) -> str:
        """What llama.cpp said went wrong since `errors` was cleared: its first error, the most specific one."""
        return re.sub(r"^\w+: ", "", self.errors[0].strip()) if self.errors else "it gave no reason"

    def _log(self, level: int, text: bytes | None, _: object) -> None:
        if level == ERROR and text and text.strip():
            self.errors.append(text.decode("utf-8", "replace"))

    def _too_old(self) -> UsageError:
        wanted = ".".join(map(str, MINIMUM[self.package]))
        return UsageError(
            f"{self.name} {self.version} is too old for --engine llama.cpp, which needs {wanted} or later: "
            f"{INSTALL[self.package]} --upgrade"
        )

    def _broken(self, error: Exception) -> UsageError:
        return UsageError(
            f"{self.name} is installed but cannot be opened ({' '.join(str(error).split())}); "
            f"install it again: {INSTALL[self.package]} --force-reinstall"
        )


def declare(function: Any, result: Any, *arguments: Any) -> None:
    """Give a ctypes function its C prototype."""
    function.restype, function.argtypes = result, list(arguments)
