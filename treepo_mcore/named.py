"""A function by its name, ``package.module:name``; the standard library is enough, reward workers start with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function_named(name: str) -> Callable[..., Any]:
    """Import it into this process. Raises `ValueError` in one line."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"expected package.module:name, found {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of the user's module: whatever it raises while it is imported
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{name!r} is not callable")
    return function  # type: ignore[no-any-return]
