"""Can what `reward` names be found and called? Looked at before a run begins."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from treepo_mcore.config import ConfigError, RewardConfig, did_you_mean
from treepo_mcore.named import function_named
from treepo_mcore.registry import import_named
from treepo_mcore.rewards.code import SECONDS as CODE_SECONDS
from treepo_mcore.rewards.code import isolates
from treepo_mcore.rewards.known import REWARDS, Named, Recipe
from treepo_mcore.rewards.worker import VERL, arguments_of

log = logging.getLogger(__name__)

KEY_VARIABLE = "key_variable"  # option that names a variable of the environment


def check_function(config: RewardConfig) -> None:
    """Raise `ConfigError` for a function that cannot be found or called, and for options that it does not have."""
    for key, name, options in _named(config):
        if name not in REWARDS and ":" not in name:
            expected = f"expected {', '.join(REWARDS)} or package.module:name"
            raise ConfigError(f"{key}.function: {expected}, found {name!r}{did_you_mean(name, REWARDS)}")
        ours = name in REWARDS
        function = function_named(REWARDS[name]) if ours else import_named(f"{key}.function", name)
        _check_options(key, name, function, options, ours)
        if (variable := options.get(KEY_VARIABLE)) and variable not in os.environ:
            raise ConfigError(f"{key}.options.{KEY_VARIABLE}: there is no variable {variable} in the environment")
        if name == "code":
            _check_code(f"{key}.options", options.get("seconds", CODE_SECONDS), config.timeout)


def recipe_of(config: RewardConfig) -> Recipe:
    """What a worker computes."""
    (_, name, options), *others = _named(config)
    components = dict(zip(config.components, (Named(REWARDS.get(n, n), o) for _, n, o in others), strict=True))
    return Recipe(Named(REWARDS.get(name, name), options), components)


def secrets_of(config: RewardConfig) -> set[str]:
    """Variables of the environment that workers get although their names say that they are secret."""
    return {str(options[KEY_VARIABLE]) for _, _, options in _named(config) if options.get(KEY_VARIABLE)}


def _named(config: RewardConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, name and options of all functions, the one that says what is correct first."""
    yield "reward", config.function, config.options
    for name, component in config.components.items():
        yield f"reward.components.{name}", component.function, component.options


def _check_options(key: str, name: str, function: Callable[..., Any], options: dict[str, Any], ours: bool) -> None:
    try:
        signature = inspect.signature(function, eval_str=ours)
    except ValueError as error:  # a built-in that does not say
        raise ConfigError(f"{key}.function: {error}") from error
    known = [n for n, p in signature.parameters.items() if not ours or p.kind is p.KEYWORD_ONLY]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option, value in options.items():
        if option not in known and not takes_any:
            has = ", ".join(known) or "none"
            raise ConfigError(f"{key}.options: {name} has {has}, found {option!r}{did_you_mean(option, known)}")
        if ours:
            _check_type(f"{key}.options.{option}", signature.parameters[option].annotation, value)
    needed = [name for name in known if signature.parameters[name].default is inspect.Parameter.empty]
    if ours and (missing := [name for name in needed if name not in options]):
        raise ConfigError(f"{key}.options: {name} needs {', '.join(missing)}")
    try:
        signature.bind(**arguments_of(function, ("", "", "", {})), **options)
    except TypeError as error:
        module, _, attribute = name.partition(":")
        raise ConfigError(
            f"{key}.function: expected f(response, answer, prompt, row) or verl's ({', '.join(VERL)}), found "
            f"{name}{signature}; write a wrapper, and name it: from {module} import {attribute}; "
            f"def reward(response, answer, prompt, row): return {attribute}(...)"
        ) from error


def _check_code(key: str, seconds: float, timeout: float) -> None:
    if seconds >= timeout:
        raise ConfigError(
            f"{key}.seconds: {seconds:g} s for the tests of a program, reward.timeout ends the call after {timeout:g} s"
        )
    if os.environ.get("RANK", "0") == "0" and not isolates():
        log.warning("this system has no namespaces for its users: programs of the model can reach the network")


def _check_type(key: str, annotation: Any, value: Any) -> None:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{key}: {error.errors()[0]['msg'].lower()}, found {value!r}") from error
    if key.endswith(".pattern"):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{key}: expected a regular expression, found {value!r}: {error}") from error
