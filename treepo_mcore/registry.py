"""What a configuration key names: an entry of a dictionary, or a function of the user's as ``package.module:name``.

A module of the user's is first imported in a process of its own, with a time limit: one that exits, hangs or dies takes
nobody along.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from treepo_mcore.config import ConfigError, did_you_mean
from treepo_mcore.named import function_named

IMPORT_SECONDS = 60  # a module may take to import
DONE = "treepo_mcore: imported"


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
    function = import_named(key, name)
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        found = f"{name}{inspect.signature(function)}"
        raise ConfigError(f"{key}: expected a function of ({', '.join(parameters)}), found {found}") from error
    return function


def import_named(key: str, name: str) -> Callable[..., Any]:
    """The same without a look at its parameters."""
    module = name.partition(":")[0]
    # The others of a job hear from rank 0 how it went: they are ended with it.
    if ":" in name and module and os.environ.get("RANK", "0") == "0" and (why := _why_not(module)):
        raise ConfigError(f"{key}: cannot import {name!r}: {why}")
    try:
        return function_named(name)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


@cache
def _why_not(module: str) -> str | None:
    """Why it cannot be imported here: it ends the process or does not come to an end. None where it can be tried."""
    if module in sys.modules:
        return None
    # The alarm ends the process even inside C code, and when nobody waits for it any more.
    code = (
        "import importlib, signal, sys; signal.alarm(int(sys.argv[1])); "
        "importlib.import_module(sys.argv[2]); print(sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(IMPORT_SECONDS), module, DONE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == -signal.SIGALRM:
        return f"it took longer than {IMPORT_SECONDS} s"
    if done.returncode < 0:
        return f"it ended its process by {signal.Signals(-done.returncode).name}"
    if done.stdout.endswith(f"{DONE}\n") or "Traceback (most recent call last)" in done.stderr:
        return None  # what it raises is told where it is raised again
    return f"it ended its process with status {done.returncode}"
