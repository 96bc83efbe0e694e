"""What config.json says about its model: sizes and rotary embedding.

Everything later (Megatron's model, vLLM's model, the weight layouts) reads this one description. A family that is not
in `families.FAMILIES`, or a feature that the Megatron model would silently ignore, is refused here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_mcore.config import ConfigError
from treepo_mcore.model.decoder import QKV_BIAS
from treepo_mcore.model.families import FAMILIES, parts_of
from treepo_mcore.model.family import Family
from treepo_mcore.model.files import read_json
from treepo_mcore.model.sizes import Architecture, Sizes

if TYPE_CHECKING:
    import torch

SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the sequence's length


def read_architecture(directory: Path) -> Architecture:
    """Read ``config.json``. Raises `ConfigError` for what the Megatron model could not honour."""
    raw = read_json(directory / "config.json")
    sizes = _sizes(directory, raw)
    inv_freq, scale = _rope(directory, raw, sizes.head_dim)
    return Architecture(**vars(sizes), rope_inv_freq=tuple(inv_freq.tolist()), rope_scale=scale)


def read_sizes(directory: Path) -> Sizes:
    """The same without the rotary embedding, and as strict."""
    return _sizes(directory, read_json(directory / "config.json"))


def _sizes(directory: Path, raw: dict[str, Any]) -> Sizes:
    names = raw.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise ConfigError(f"{directory}/config.json: architecture {names[0]}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[names[0]]
    _refuse_unsupported(directory, raw, family)
    given = {key: _size(directory, raw, key) for key in SIZE_KEYS}
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    sizes = Sizes(
        family=family.name,
        hidden=hidden,
        ffn=given["intermediate_size"],
        layers=given["num_hidden_layers"],
        heads=heads,
        # Where the keys are absent or null, what transformers assumes.
        kv_heads=_size(directory, raw, "num_key_value_heads", heads),
        head_dim=_size(directory, raw, "head_dim", family.head_dim or hidden // heads),
        vocab=given["vocab_size"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tied=raw.get("tie_word_embeddings", False),
        max_positions=_longest(raw, _size(directory, raw, "max_position_embeddings", 32768)),
        initializer_range=raw.get("initializer_range", 0.02),
    )
    if raw.get("attention_bias") and not parts_of(sizes).holds(QKV_BIAS):
        raise ConfigError(
            f"{directory}/config.json: attention_bias is true: biases on {family.name} attention are not supported"
        )
    return sizes


def _size(directory: Path, raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{directory}/config.json: expected {key} to be a positive number, found {value!r}")
    return value


def _longest(raw: dict[str, Any], longest: int) -> int:
    """Positions that the rotary embedding is made for, as vLLM derives them: scaled where the checkpoint scales it."""
    rope = _rope_settings(raw)
    kind, factor = _rope_kind(rope), rope.get("factor") or 1.0
    if kind == "yarn":
        return int(rope.get("original_max_position_embeddings", longest) * factor)
    return int(longest * factor) if kind == "linear" else longest


def _refuse_unsupported(directory: Path, raw: dict[str, Any], family: Family) -> None:
    where = f"{directory}/config.json"
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {raw['hidden_act']!r}; supported: 'silu'")
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias is true: biases in the MLP are not supported")
    part = (raw | _rope_settings(raw)).get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor {part}; supported: 1.0")
    if raw.get("use_sliding_window") and "sliding_attention" in raw.get("layer_types", ["sliding_attention"]):
        raise ConfigError(f"{where}: use_sliding_window is true: sliding-window attention is not supported")
    window = raw.get("sliding_window", family.window) if family.windowed else None
    if window is not None and window < _size(directory, raw, "max_position_embeddings", 32768):
        raise ConfigError(
            f"{where}: sliding_window {window} is less than max_position_embeddings: "
            "sliding-window attention is not supported"
        )
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: the checkpoint is quantised; training needs bf16, fp16 or fp32 weights")


def _rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """Of both spellings; the newer one wins."""
    return (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})


def _rope_kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope(directory: Path, raw: dict[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cosine and sine, as `transformers` computes them."""
    import torch

    rope = _rope_settings(raw)
    kind = _rope_kind(rope)
    if kind not in STATIC_ROPE:
        raise ConfigError(f"{directory}/config.json: rope type {kind!r}; supported: {', '.join(STATIC_ROPE)}")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (theta**exponents), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf_config = AutoConfig.from_pretrained(directory)
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    if not math.isfinite(scale) or len(inv_freq) != head_dim // 2:
        raise ConfigError(f"{directory}/config.json: rope type {kind!r} gave {len(inv_freq)} frequencies")
    return inv_freq.float(), float(scale)
