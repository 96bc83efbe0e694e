"""What a configuration key names: an entry of a dictionary, or a function of the user's as ``package.module:name``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from treepo_mcore.config import ConfigError, did_you_mean


def resolve[T](key: str, name: str, known: Mapping[str, T], own: Callable[[Any], T], parameters: tuple[str, ...]) -> T:
    """The entry called `name`, or `own` of the function that it names.

    key: of the configuration, for messages; parameters: with which such a function is called, one after the other.
    Raises `ConfigError` in one line.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        words = f"expected {', '.join(known)} or package.module:name"
        raise ConfigError(f"{key}: {words}, found {name!r}{did_you_mean(name, known)}")
    return own(import_function(key, name, parameters))


def import_function(key: str, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """What ``package.module:name`` names; `parameters` is what it is called with. Raises `ConfigError` in one line."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{key}: expected package.module:name, found {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of the user's module: whatever it raises while it is imported
        raise ConfigError(f"{key}: cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{key}: {name!r} is not callable")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        found = f"{name}{inspect.signature(function)}"
        raise ConfigError(f"{key}: expected a function of ({', '.join(parameters)}), found {found}") from error
    return function  # type: ignore[no-any-return]
