"""Kimi-VL-A3B, whole and faithful, on a laptop CPU or one graphics card.

    import kimi_lite
    model = kimi_lite.load("model.gguf")
    print(model.ask("Why is the sky blue?").text)

Importing does no work: names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kimi_lite.errors import DoesNotFitError, KimiLiteError, KimiLiteWarning, ModelFileError, UsageError

if TYPE_CHECKING:
    from kimi_lite.api import Answer, Conversation, Event, Model, Stats, load
    from kimi_lite.runtime.sampling import SamplingOptions

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Conversation",
    "DoesNotFitError",
    "Event",
    "KimiLiteError",
    "KimiLiteWarning",
    "Model",
    "ModelFileError",
    "SamplingOptions",
    "Stats",
    "TokenLogprob",
    "UsageError",
    "load",
]
_HOMES = dict.fromkeys(
    ("Answer", "Conversation", "Event", "Model", "Stats", "TokenLogprob", "load"), "kimi_lite.api"
)
_HOMES["SamplingOptions"] = "kimi_lite.runtime.sampling"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kimi_lite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
