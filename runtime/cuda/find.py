"""Is there a card to use? The one question, and in one sentence each the reasons why not.

Drivers are asked for, nothing is initialised, so that a machine without a card loses no time. KIMI_LITE_DEVICE takes the
place of all this with simulated cards, for tests and for trying out plans: `simulated:8G`, or `simulated:8G,6G` for two.
"""

import ctypes
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from kimi_lite.errors import UsageError
from kimi_lite.runtime.cuda.device import Device, NoDeviceError

KERNELS = "kimi_lite.runtime.cuda.cuda"
DRIVERS = ("libcuda.so.1", "nvcuda.dll")
PCI = Path("/sys/bus/pci/devices")
MAKERS = {"0x1002": "AMD", "0x8086": "Intel", "0x10de": "NVIDIA"}


class NothingToTryError(NoDeviceError):
    """No driver, no kernels, or all cards hidden on purpose: nothing that somebody who did not ask must be told."""


def find_device() -> Device:
    """The roomiest card, opened.

    Raises:
        NothingToTryError: nothing here could be a card to use; the text says why.
        KimiLiteError: there is a driver, but no card can be used; the text says why.
    """
    named = os.environ.get("KIMI_LITE_DEVICE")
    if named:
        return _simulated(named)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        raise NothingToTryError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all cards; unset it to use one"
        )
    if not has_driver():
        raise NothingToTryError(_why_no_driver())
    if find_spec(KERNELS) is None:
        raise NothingToTryError("this version of kimi-lite has no kernels for graphics cards")
    return cast(Device, import_module(KERNELS).open_device())


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded."""
    for name in DRIVERS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def makers() -> list[str]:
    """Who made the display controllers of this machine, where the system lists them."""
    found = set[str]()
    for device in PCI.glob("*"):
        try:
            if (device / "class").read_text().startswith("0x03"):
                found.add(MAKERS.get((device / "vendor").read_text().strip(), "another maker"))
        except OSError:
            continue
    return sorted(found)


def _why_no_driver() -> str:
    there = makers()
    if "NVIDIA" in there:
        return "an NVIDIA card is there, but not its driver (libcuda.so.1); install it, then try again"
    if there:
        return f"the graphics here is by {' and '.join(there)}; kimi-lite's kernels are for NVIDIA cards"
    return "no graphics card with an NVIDIA driver is here"


def _simulated(named: str) -> Device:
    from kimi_lite.runtime.cuda.simulated import SimulatedDevice
    from kimi_lite.runtime.placement import parse_size

    kind, _, sizes = named.partition(":")
    if kind != "simulated" or not sizes:
        raise UsageError(
            f"KIMI_LITE_DEVICE is {named!r}; give simulated:8G, simulated:8G,6G for two, or unset it"
        )
    capacities = [parse_size(size, "KIMI_LITE_DEVICE") for size in sizes.split(",")]
    return SimulatedDevice(max(capacities), n_cards=len(capacities))
