"""The system's own driver and its card, in the place of the one without a card: `KIMI_LITE_TEST_CARD=1 pytest tests/cuda`.

Tests that need a machine of their choice (faults, other cards, the shim's arithmetic) are skipped then; all others hold
the card itself against the CPU.
"""

import ctypes
from collections import Counter
from typing import Any, NoReturn

import pytest
from fake_driver import FakeDriver

from kimi_lite.runtime.cuda.driver import LIBRARY, Card


class RealDriver(FakeDriver):
    """A machine as it is; what is called and what is allocated is counted on the way to the driver."""

    def __init__(self) -> None:
        self.path, self._calls, self._sizes = LIBRARY, Counter[str](), dict[int, int]()
        counted, open_library = self, Card._driver_version

        def watched(card: Card, ordinal: int | None) -> tuple[int, int]:
            card._library = _Watched(card._library, counted)  # type: ignore[assignment]
            return open_library(card, ordinal)

        Card._driver_version = watched  # type: ignore[method-assign,assignment]

    def machine(self, *choices: Any, **named: Any) -> None:
        if choices or named:
            _only_without_a_card()
        self._calls.clear()
        self._sizes.clear()

    def order(self, *, backwards: bool) -> None:
        if backwards:
            _only_without_a_card()

    def calls(self, function: str) -> int:
        return self._calls[function]

    def used(self) -> int:
        return sum(self._sizes.values())

    def fail(self, *_: Any, **__: Any) -> NoReturn:
        _only_without_a_card()

    mma = half = float = run = fail


class _Watched:
    def __init__(self, library: ctypes.CDLL, driver: RealDriver) -> None:
        self._library, self._driver = library, driver

    def __getattr__(self, name: str) -> Any:
        function, calls, sizes = getattr(self._library, name), self._driver._calls, self._driver._sizes

        def call(*arguments: Any) -> int:
            calls[name] += 1
            code = int(function(*arguments))
            if name == "cuMemAlloc_v2" and code == 0:
                sizes[arguments[0]._obj.value] = arguments[1].value
            elif name == "cuMemFree_v2":
                sizes.pop(arguments[0].value, None)
            return code

        return call


def _only_without_a_card() -> NoReturn:
    pytest.skip("this is a matter of the driver without a card")
