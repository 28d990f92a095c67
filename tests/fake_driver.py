"""The driver library without a card, tests/cuda/fake_cuda.cpp, and the knobs that it has besides."""

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class FakeDriver:
    """A machine of one's choice."""

    def __init__(self, path: Path) -> None:
        self.path, self._library = str(path), ctypes.CDLL(str(path))
        self._library.fake_used.restype = ctypes.c_size_t
        self._library.fake_float.restype = ctypes.c_float

    def machine(
        self, devices: int = 1, version: int = 13000, capability: int = 86, memory: int = 1 << 30
    ) -> None:
        """So many cards of this compute capability (times ten), and a driver of this version."""
        self._library.fake_machine(devices, version, capability, ctypes.c_size_t(memory))

    def fail(self, function: str, code: int, after: int = 0) -> None:
        """Let a call of the function return an error, after so many that do not; from 700 on all others then too."""
        self._library.fake_fail(function.encode(), code, after)

    def order(self, *, backwards: bool) -> None:
        """In which blocks, warps and threads run."""
        self._library.fake_order(int(backwards))

    def run(self, stream: int) -> None:
        """Do what is queued there, as a card does by itself."""
        assert self._library.cuStreamSynchronize(ctypes.c_void_p(stream)) == 0

    def calls(self, function: str) -> int:
        return int(self._library.fake_calls(function.encode()))

    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self._library.fake_used())

    def mma(
        self,
        a_X4: NDArray[np.uint32],
        b_X2: NDArray[np.uint32],
        c_X4: NDArray[np.int32],
        *,
        by_quarters: bool,
    ) -> NDArray[np.int32]:
        """One step of the tensor cores on the registers of a warp's 32 lanes: what they hold of c afterwards."""
        out_X4 = c_X4.copy()
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (a_X4, b_X2, out_X4))
        self._library.fake_mma(int(by_quarters), *pointers)
        return out_X4

    def half(self, bits: int) -> int:
        """The shim's float16 bits of a float32's bits."""
        return int(self._library.fake_half(ctypes.c_int32(bits)))

    def float(self, half: int) -> float:
        return float(self._library.fake_float(half))
