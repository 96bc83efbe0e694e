"""YAML files and overrides to a checked configuration, and back; errors in one line."""

from __future__ import annotations

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
    """Read a YAML file, apply ``a.b.c=value`` overrides (values are YAML), validate.

    Relative paths are taken from the current directory. Raises `ConfigError` with one line.
    """
    file = Path(path)
    raw = read_yaml(file)
    for override in overrides or []:
        apply_override(raw, override)
    return parse_config(raw, where=str(file))


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
