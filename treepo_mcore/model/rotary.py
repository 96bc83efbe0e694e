"""The rotary embedding that config.json describes, read once and told to both sides.

Libraries know different keys: vLLM multiplies YaRN's factor on cosine and sine by `attn_factor`, which `transformers`
does not know, and does not know its `attention_factor`, `mscale` and `mscale_all_dim`. So actor and engine both get
what `read_rotary` makes of the file, and no key that it does not know passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from treepo_mcore.config import ConfigError
from treepo_mcore.model.files import number

if TYPE_CHECKING:
    import torch

# Angles that do not depend on the sequence's length: kind -> the numbers that it needs.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # and what their absence means
ATTENTION = ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")  # of YaRN, each may be absent
NEUTRAL = ("factor", *ATTENTION[:2])  # change nothing under a kind without them, where they are 1
# Say nothing about the angles of a kind that does not read them.
IDLE = ("original_max_position_embeddings", "finetuned")
FIXED = {"partial_rotary_factor": 1.0, "extrapolation_factor": 1.0, "apply_yarn_scaling": True}  # no other value


@dataclass(frozen=True)
class Rotary:
    """Of all heads alike."""

    kind: str
    theta: float
    numbers: dict[str, float] = field(default_factory=dict, hash=False)  # of the kind, under transformers' names
    truncate: bool = True  # YaRN's range is rounded to whole dimensions
    scale: float = 1.0  # on cosine and sine

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """float32 [head_dim / 2], as `transformers` computes them."""
        import torch

        if self.kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
            return 1.0 / (self.theta**exponents)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = {"rope_type": self.kind, "rope_theta": self.theta, **self.numbers}
        rope |= {"truncate": self.truncate, "attention_factor": self.scale}
        config = SimpleNamespace(
            rope_parameters=rope, head_dim=head_dim, hidden_size=head_dim, standardize_rope_params=lambda: None
        )
        config.num_attention_heads = 1
        return ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))[0].float()

    def for_vllm(self) -> dict[str, Any]:
        """`rope_parameters` under which vLLM computes the same."""
        rope = {"rope_type": self.kind, "rope_theta": self.theta, **self.numbers}
        if self.kind != "yarn":
            return rope
        return rope | {"truncate": self.truncate, "attn_factor": self.scale / magnitude(self.numbers["factor"])}


def read_rotary(where: str, raw: dict[str, Any], kinds: Sequence[str] = tuple(KINDS)) -> Rotary:
    """From config.json's content. where: its name, for messages; kinds: that the family has.

    Raises `ConfigError` for what is not supported.
    """
    rope = rope_settings(where, raw)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{where}: rope type {kind!r:.80}; supported: {', '.join(kinds)}")
    if rope.get("type", kind) != kind:
        raise ConfigError(f"{where}: type: expected rope_type = {kind!r}, found {rope['type']!r:.80}")
    for key, only in FIXED.items():
        if (raw | rope).get(key, only) != only:
            raise ConfigError(f"{where}: {key} {(raw | rope)[key]}; supported: {only}")
    of_yarn = (*YARN, *ATTENTION, "truncate", "original_max_position_embeddings") if kind == "yarn" else ()
    known = {"rope_type", "type", "rope_theta", *IDLE, *FIXED, *KINDS[kind], *of_yarn}
    for key in rope.keys() - known:
        if rope[key] is not None and not (key in NEUTRAL and rope[key] == 1):
            raise ConfigError(f"{where}: {key} of the {kind} rotary embedding is not supported")
    theta = number(where, rope | {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta")}, "rope_theta", 10000.0)
    if theta <= 1:
        raise ConfigError(f"{where}: rope_theta: expected more than 1, found {theta:g}")
    numbers = {key: number(where, rope, key) for key in KINDS[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise ConfigError(f"{where}: high_freq_factor: expected more than low_freq_factor, found no more")
    if numbers.get("factor", 1.0) < 1.0:
        raise ConfigError(f"{where}: factor: expected 1 or more, found {numbers['factor']}")
    if kind != "yarn":
        return Rotary(kind, theta, numbers)
    numbers |= {key: number(where, rope, key, absent) for key, absent in YARN.items()}
    longest = number(where, raw, "max_position_embeddings", 32768)
    key = "original_max_position_embeddings"
    numbers[key] = number(where, rope, key, number(where, raw, key, longest))
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{where}: truncate: expected true or false, found {truncate!r}")
    return Rotary(kind, theta, numbers, truncate, _yarn_scale(where, rope, numbers["factor"]))


def rope_settings(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Of the spelling that is there. Both may be, where they say the same: not all readers would take the same one."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if not isinstance(value, dict | None):
            raise ConfigError(f"{where}: {key}: expected an object, found {value!r:.80}")
        found.append(value or {})
    newer, older = found
    if newer and older and _plainly(newer) != _plainly(older):
        raise ConfigError(f"{where}: rope_parameters and rope_scaling differ; expected one of the two")
    return newer or older


def _plainly(rope: dict[str, Any]) -> dict[str, Any]:
    """Without the older name of the kind, and without nulls."""
    values = {key: value for key, value in rope.items() if value is not None}
    kind = values.pop("type", "default")
    return {"rope_type": kind} | values


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cosine and sine for a context that is `factor` times longer."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_scale(where: str, rope: dict[str, Any], factor: float) -> float:
    """`attention_factor` is the whole factor, `attn_factor` (vLLM's, and of some checkpoints) is one on top of it."""
    given = {key: number(where, rope, key) for key in ATTENTION if rope.get(key) is not None}
    if "attention_factor" in given and "attn_factor" in given:
        raise ConfigError(f"{where}: attention_factor and attn_factor: expected at most one of them")
    if "attention_factor" in given:
        return given["attention_factor"]
    scale = magnitude(factor)
    if "mscale" in given and "mscale_all_dim" in given:
        scale = magnitude(factor, given["mscale"]) / magnitude(factor, given["mscale_all_dim"])
    return scale * given.get("attn_factor", 1.0)
