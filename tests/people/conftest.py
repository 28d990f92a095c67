"""A running server, for the tests that ask one."""

from collections.abc import Iterator
from typing import Any

import pytest
from http_server import Running, running


@pytest.fixture(scope="module")
def nano() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(nano: Running) -> Iterator[Any]:
    with nano.client() as found:
        yield found
