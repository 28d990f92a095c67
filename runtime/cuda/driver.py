"""One card through the driver's own library: memory, streams of work in order, launches, graphs.

The driver (`libcuda.so.1`, `nvcuda.dll`) is called by ctypes. It is on every machine that has a card, its functions
are stable, and loading it takes milliseconds where importing PyTorch takes seconds. Everything is queued on one
stream; `synchronize` waits for it. Beside it runs a second stream, for copies `aside`; events order the two, and let the
host wait for a place in either. Each function of the driver returns a code, and any code but success becomes one
of three errors: NoDeviceError at the start, DeviceMemoryError for memory, DeviceLostError for everything after.

Any thread may call, but not two at once: a context belongs to a thread, and goes with whoever calls.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import KimiLiteError
from kimi_lite.runtime.cuda.device import DeviceLostError, DeviceMemoryError, NoDeviceError
from kimi_lite.runtime.cuda.program import Nvrtc, compiled, signatures

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
OUT_OF_MEMORY, NO_DEVICE = 2, 100  # CUDA_ERROR_...
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with anybody else's work
NO_TIMES = 2  # CU_EVENT_DISABLE_TIMING
THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
OLDEST_DRIVER = (11, 4)  # the first with cuGraphInstantiateWithFlags
PCIE_BYTES, PCIE_COPIES = 32 << 20, 4  # by which PCIe is measured


class Card:
    """One graphics card with the kernels loaded."""

    def __init__(self, library: str | None = None, ordinal: int | None = None) -> None:
        """Open a card; the first start on a machine compiles the kernels, which takes some seconds.

        Args:
            library: path of the driver's library, by default the system's.
            ordinal: which of the cards that CUDA_VISIBLE_DEVICES leaves; None for the one with most memory.

        Raises:
            NoDeviceError: no driver, no card, or a driver too old for the kernels.
            NoCompilerError: no NVRTC, or none for this card.
        """
        try:
            self._library = ctypes.CDLL(library or LIBRARY)
        except OSError as error:
            raise NoDeviceError(
                f"the NVIDIA driver's library {library or LIBRARY} does not load ({error}); "
                "install the driver, or run on the CPU"
            ) from error
        self.name, self._lost = "the card", ""
        self._memory, self._pinned, self._graphs = set[int](), set[int](), list[ctypes.c_void_p]()
        self._events = list[ctypes.c_void_p]()
        self._context, self._stream, self._aside, self._module = (ctypes.c_void_p() for _ in range(4))
        self._kernels = dict[str, ctypes.c_void_p]()
        self._thread = 0  # in which the context is current
        cuda = self._driver_version(ordinal)
        try:
            self._open(ordinal, cuda)
        except KimiLiteError:
            self.close()
            raise

    def _driver_version(self, ordinal: int | None) -> tuple[int, int]:
        """The version of CUDA that the driver supports, once it is known to work and to show the card."""
        version, count = ctypes.c_int(), ctypes.c_int()
        code = self._library.cuInit(0)
        if code not in (0, NO_DEVICE):
            raise NoDeviceError(
                f"the NVIDIA driver does not start ({self._words(code)}); restart the machine, or run on the CPU"
            )
        if code == 0:
            self._library.cuDriverGetVersion(ctypes.byref(version))
            self._library.cuDeviceGetCount(ctypes.byref(count))
        self._count = count.value
        if count.value == 0:
            raise NoDeviceError(
                "the NVIDIA driver shows no card; is one built in, and does CUDA_VISIBLE_DEVICES leave it visible? "
                "Else run on the CPU"
            )
        if ordinal is not None and not 0 <= ordinal < count.value:
            raise NoDeviceError(
                f"card {ordinal} was asked for, the driver shows {count.value}; cards count from 0, and "
                "CUDA_VISIBLE_DEVICES may hide some"
            )
        cuda = version.value // 1000, version.value % 1000 // 10
        if cuda < OLDEST_DRIVER:
            raise NoDeviceError(
                f"the NVIDIA driver supports CUDA {cuda[0]}.{cuda[1]}; kimi-lite needs {OLDEST_DRIVER[0]}."
                f"{OLDEST_DRIVER[1]} or newer: update the driver, or run on the CPU"
            )
        return cuda

    def _open(self, ordinal: int | None, cuda: tuple[int, int]) -> None:
        self._device = self._roomiest() if ordinal is None else self._nth(ordinal)
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, len(name), self._device)
        self.name = name.value.decode(errors="replace")
        self.capability = 10 * self._attribute(CAPABILITY_MAJOR) + self._attribute(CAPABILITY_MINOR)
        program = compiled(self.capability, Nvrtc(driver_cuda=cuda))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        for stream in (self._stream, self._aside):
            self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self._call("cuModuleLoadData", ctypes.byref(self._module), program.cubin)
        for kernel in signatures():
            handle = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(handle), self._module, kernel.encode())
            self._kernels[kernel] = handle

    @property
    def ordinal(self) -> int:
        """Which card it is of those that CUDA_VISIBLE_DEVICES leaves, as PyTorch counts them too."""
        return self._device.value

    @property
    def stream(self) -> int:
        """The address of the stream on which all work is queued."""
        return self._stream.value or 0

    def memory_bytes(self) -> tuple[int, int]:
        """Free and in all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, n_bytes: int, what: str) -> int:
        """The address of n_bytes of device memory, a multiple of 256. `what` is named if there is no room."""
        address = ctypes.c_uint64()
        self._check_alive()
        code = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(n_bytes, 1)))
        if code == OUT_OF_MEMORY:
            free = self.memory_bytes()[0]
            raise DeviceMemoryError(
                f"{self.name}: {what} takes {n_bytes / 1e6:.1f} MB of graphics memory, {free / 1e6:.1f} MB are free; "
                "ask for a shorter --context, keep fewer experts on the card, or close what else uses it"
            )
        self._check("cuMemAlloc_v2", code)
        self._memory.add(address.value)
        return address.value

    def free(self, address: int) -> None:
        self.synchronize()
        self._call("cuStreamSynchronize", self._aside)
        self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._memory.discard(address)

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Host memory that the card copies from and to by itself, uint8 [n_bytes], until `unpin` or `close`.

        Raises DeviceMemoryError.
        """
        at = ctypes.c_void_p()
        self._check_alive()
        code = self._library.cuMemHostAlloc(ctypes.byref(at), ctypes.c_size_t(n_bytes), 0)
        if code == OUT_OF_MEMORY:
            raise DeviceMemoryError(
                f"{self.name}: {n_bytes / 1e6:.1f} MB of main memory cannot be pinned for it; close other programs, or "
                "run on the CPU"
            )
        self._check("cuMemHostAlloc", code)
        assert at.value is not None
        self._pinned.add(at.value)
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(at.value))

    def unpin(self, pinned: NDArray[np.uint8]) -> None:
        """Give host memory of `pinned` back; nobody may use the array any more."""
        self.synchronize()
        self._call("cuMemFreeHost", _address(pinned))
        self._pinned.discard(pinned.ctypes.data)

    def upload(self, address: int, array: NDArray[Any], *, aside: bool = False) -> None:
        """Queue a copy to the device. The array must stay as it is until the copy is waited for."""
        assert array.flags.c_contiguous
        if array.nbytes:
            self._call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(address),
                _address(array),
                ctypes.c_size_t(array.nbytes),
                self._aside if aside else self._stream,
            )

    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from the device; the array holds it after the next `synchronize`."""
        assert array.flags.c_contiguous
        if array.nbytes:
            self._call(
                "cuMemcpyDtoHAsync_v2",
                _address(array),
                ctypes.c_uint64(address),
                ctypes.c_size_t(array.nbytes),
                self._stream,
            )

    def clear(self, address: int, n_bytes: int) -> None:
        """Queue the filling of device memory with zeros."""
        self._call("cuMemsetD8Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(n_bytes), self._stream)

    def launch(
        self, kernel: str, grid: Sequence[int], threads: int, shared_bytes: int, *arguments: Any
    ) -> None:
        """Queue a kernel over a grid of one to three axes; what it takes is checked against its source."""
        kinds = signatures()[kernel]
        assert len(kinds) == len(arguments), (
            f"{kernel} takes {len(kinds)} arguments, {len(arguments)} were given"
        )
        values = [
            value if isinstance(value, ctypes.Structure) else kind(value)
            for kind, value in zip(kinds, arguments, strict=True)
        ]
        assert all(isinstance(value, kind) for kind, value in zip(kinds, values, strict=True)), (
            f"{kernel}: a wrong structure"
        )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        axes = (*grid, 1, 1)[:3]
        self._call(
            "cuLaunchKernel",
            self._kernels[kernel],
            *axes,
            threads,
            1,
            1,
            shared_bytes,
            self._stream,
            pointers,
            None,
            what=f"launching {kernel}",
        )

    def synchronize(self) -> None:
        """Wait for everything queued, but for what is aside."""
        self._call("cuStreamSynchronize", self._stream)

    def event(self) -> ctypes.c_void_p:
        """A mark to set in a stream; it lives as long as the card. Who waits for one that was never set does not wait."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), NO_TIMES)
        self._events.append(event)
        return event

    def mark(self, event: ctypes.c_void_p, *, aside: bool = False) -> None:
        """Set the mark behind all that is queued, or behind all that is queued aside."""
        self._call("cuEventRecord", event, self._aside if aside else self._stream)

    def order(self, event: ctypes.c_void_p, *, aside: bool = False) -> None:
        """What is queued from here on, or queued aside, waits until the card has reached the mark."""
        self._call("cuStreamWaitEvent", self._aside if aside else self._stream, event, 0)

    def wait(self, event: ctypes.c_void_p) -> None:
        """Wait here until the card has reached the mark."""
        self._call("cuEventSynchronize", event)

    def pcie_gb_s(self) -> float:
        """GB/s from pinned memory to the card, the best of a few copies. Raises DeviceMemoryError."""
        at, seconds = self.allocate(PCIE_BYTES, "measuring PCIe"), list[float]()
        try:
            host = self.pinned(PCIE_BYTES)
            for _ in range(PCIE_COPIES):
                start = time.perf_counter()
                self.upload(at, host)
                self.synchronize()
                seconds.append(time.perf_counter() - start)
            self.unpin(host)
        finally:
            self.free(at)
        return PCIE_BYTES / min(seconds) / 1e9

    def begin_capture(self) -> None:
        """From here on launches are recorded, not run, until `end_capture`."""
        self._call("cuStreamBeginCapture_v2", self._stream, THIS_THREAD)

    def end_capture(self) -> ctypes.c_void_p:
        """What was recorded, ready to be run by `launch_graph` as often as wanted."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)
        self._graphs.append(ready)
        return ready

    def launch_graph(self, graph: ctypes.c_void_p) -> None:
        """Queue a recorded sequence of launches."""
        self._call("cuGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Give everything back; safe after a loss and more than once."""
        if not self._context:
            return
        self._library.cuCtxSetCurrent(self._context)
        for graph in self._graphs:
            self._library.cuGraphExecDestroy(graph)
        for stream in filter(None, (self._stream, self._aside)):
            self._library.cuStreamSynchronize(stream)
        for event in self._events:
            self._library.cuEventDestroy_v2(event)
        for address in self._memory:
            self._library.cuMemFree_v2(ctypes.c_uint64(address))
        for host in self._pinned:
            self._library.cuMemFreeHost(ctypes.c_void_p(host))
        self._library.cuModuleUnload(self._module)
        for stream in filter(None, (self._stream, self._aside)):
            self._library.cuStreamDestroy_v2(stream)
        self._library.cuDevicePrimaryCtxRelease_v2(self._device)
        self._context = ctypes.c_void_p()
        self._lost = self._lost or f"{self.name} was closed"

    def _nth(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _roomiest(self) -> ctypes.c_int:
        def total(device: ctypes.c_int) -> int:
            n_bytes = ctypes.c_size_t()
            self._call("cuDeviceTotalMem_v2", ctypes.byref(n_bytes), device)
            return n_bytes.value

        return max((self._nth(ordinal) for ordinal in range(self._count)), key=total)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any, what: str = "") -> None:
        self._check_alive()
        self._check(name, getattr(self._library, name)(*arguments), what)

    def _check_alive(self) -> None:
        if self._lost:
            raise DeviceLostError(self._lost)
        if self._context and self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._context))

    def _check(self, name: str, code: int, what: str = "") -> None:
        if code:
            self._lost = (
                f"{self.name} failed ({what or name}: {self._words(code)}); nothing on it can be "
                "used any more: start again, or run on the CPU"
            )
            raise DeviceLostError(self._lost)

    def _words(self, code: int) -> str:
        words = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(words))
        return f"{words.value.decode() if words.value else 'unknown error'}, CUDA error {code}"


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
