"""The CPU as a card is held against it: with attention absorbed for any number of tokens."""

from kimi_lite.api import nano_path
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.model import CpuModel


def cpu_like_a_card(context: int, threads: int | None = None) -> Engine:
    """kimi-vl-nano on the CPU, with the bits that a card must have."""
    engine = Engine(nano_path(), context=context, threads=threads)
    engine.model = CpuModel(engine.weights, context, expanded=False)
    return engine
