"""YAML files and overrides to a checked configuration, and back; errors in one line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from treepo_mcore.config.base import ConfigError, Section, did_you_mean
from treepo_mcore.config.whole import Config


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's own loader lets a section that stands twice replace the first one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, merge = key.start_mark.line + 1, key.tag == "tag:yaml.org,2002:merge"
            if not merge and lines.setdefault(key.value, line) != line:
                raise yaml.YAMLError(f"{key.value} stands in line {lines[key.value]} and again in line {line}")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and those that it builds on, apply ``a.b.c=value`` overrides (values are YAML), validate.

    `base: other.yaml` in a file takes everything from that one, named from the file's own folder, and changes what the
    file says. ${NAME} in a value stands for an environment variable. Relative paths are taken from the current
    directory. Raises `ConfigError` with one line.
    """
    file = Path(path)
    raw = _with_base(file, ())
    for override in overrides or []:
        apply_override(raw, override)
    return parse_config(_with_environment(raw, str(file)), where=str(file))


def _with_base(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's mapping over that of its base. above: the files that led here."""
    if file.resolve() in above:
        raise ConfigError(f"{file}: base: builds on itself, by way of {', '.join(path.name for path in above)}")
    raw = read_yaml(file)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base: expected the name of a file, found {base!r}")
    return _merged(_with_base(file.parent / base, (*above, file.resolve())), raw)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections within sections; anything else takes the place of what was there."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _with_environment(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_environment(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_with_environment(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{where}: the environment has no variable {name}, which {value!r} needs")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", found, value)


def differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, and both values as JSON ones; None where a mapping has no such key."""
    return _differences(one.model_dump(mode="json"), other.model_dump(mode="json"), "")


def _differences(one: dict[str, Any], other: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping at a file's top. Raises `ConfigError`."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_EachKeyOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping at the top, found {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping. Raises `ConfigError` naming the first bad key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def parse_section[S: Section](kind: type[S], options: dict[str, Any], where: str = "") -> S:
    """A section from command-line options or a file of its own. Raises `ConfigError` naming the first bad one."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, kind)}" if where else _explain(error, kind)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put one ``a.b.c=value`` into a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key=value")
    try:
        value = yaml.load(text, Loader=_EachKeyOnce) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {_one_line(error)}") from error
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
        node = child
    node[last] = value


def _explain(error: ValidationError, kind: type[BaseModel] = Config) -> str:
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"] if "[" not in str(p)]  # a union's branch, such as literal[...], is no key
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        prefix = "".join(f"{part}." for part in parts[:-1])
        return f"unknown key {key}{did_you_mean(parts[-1], _known_keys(parts[:-1], kind), prefix)}"
    if first["type"] == "missing":
        return f"missing key {key}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}"


def _known_keys(path: list[str], kind: type[BaseModel]) -> list[str]:
    model = kind
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
