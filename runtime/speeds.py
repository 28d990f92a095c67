"""The speeds that predictions go by: assumed, until somebody measures them.

The defaults are round numbers of no machine in particular: two channels of DDR5 as a busy desktop delivers them, eight
cores, a card of the smaller kind on half a PCIe 4.0 slot, what a kernel costs beside its bytes on the one
card that was measured (docs/gpu.md), and what a hand-off is commonly found to cost.
"""

import math
from dataclasses import dataclass

from kimi_lite.errors import UsageError


@dataclass(frozen=True)
class Speeds:
    """What processor, card and the way between them do. Raises UsageError for numbers that no machine has."""

    cpu_gb_s: float = 40.0  # of weights read while decoding
    cpu_gmac_s: float = 600.0  # of int8 products in prefill
    card_gb_s: float = 250.0
    card_gmac_s: float = 10_000.0
    pcie_gb_s: float = 12.0
    launch_us: float = 5.0  # of each kernel
    hand_off_us: float = 20.0  # from the card to the CPU, or back
    copy_gb_s: float = 10.0  # from the file's pages to pinned memory

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value:g}"
            for name, value in vars(self).items()
            if not math.isfinite(value) or value < 0 or (value == 0 and not name.endswith("_us"))
        ]
        if wrong:
            raise UsageError(f"no machine has these speeds: {', '.join(wrong)}; give numbers above 0")

    def card_s(self, launches: int, n_bytes: float, macs: float) -> float:
        """Seconds of kernels on the card."""
        return (
            launches * self.launch_us * 1e-6 + max(n_bytes / self.card_gb_s, macs / self.card_gmac_s) * 1e-9
        )

    def cpu_s(self, n_bytes: float, macs: float) -> float:
        """Seconds of products on the CPU."""
        return max(n_bytes / self.cpu_gb_s, macs / self.cpu_gmac_s) * 1e-9

    def crossing_s(self, n_bytes: float) -> float:
        """Seconds until the other side has these bytes."""
        return self.hand_off_us * 1e-6 + n_bytes / self.pcie_gb_s * 1e-9

    def stream_s(self, n_bytes: float) -> float:
        """Seconds until experts are on the card: one is copied to pinned memory while the one before crosses."""
        return self.hand_off_us * 1e-6 + n_bytes / min(self.pcie_gb_s, self.copy_gb_s) * 1e-9


ASSUMED = Speeds()
