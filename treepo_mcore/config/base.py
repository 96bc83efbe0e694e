"""What every section of the configuration is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class ConfigError(ValueError):
    """The configuration, or a file it names, cannot be used. The message is one line for a person."""


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, numbers are finite, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


IntRange = Annotated[tuple[int, int], BeforeValidator(_pair)]  # "2" means (2, 2): inclusive bounds


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean X?", with the nearest of the known words behind the prefix, or nothing where none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
