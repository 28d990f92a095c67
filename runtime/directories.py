"""Where the runtime keeps what it may lose: encoded pictures, experts' use, compiled kernels."""

import os
from pathlib import Path


def cache_directory(name: str, variable: str) -> Path | None:
    """The user's cache directory for `name`; another one, or none for "off", if the environment variable says so."""
    named = os.environ.get(variable)
    if named == "off":
        return None
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("kimi-lite") / name
