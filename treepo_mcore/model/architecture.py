"""What config.json says about its model: sizes and rotary embedding.

Everything later (Megatron's model, vLLM's model, the weight layouts) reads this one description. A family that is not
in `families.FAMILIES`, or a feature that the Megatron model would silently ignore, is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treepo_mcore.config import ConfigError
from treepo_mcore.model.decoder import QKV_BIAS
from treepo_mcore.model.experts import read_experts
from treepo_mcore.model.families import FAMILIES, parts_of
from treepo_mcore.model.family import Family
from treepo_mcore.model.files import number, read_json, truth, whole
from treepo_mcore.model.rotary import Rotary, read_rotary
from treepo_mcore.model.sizes import Architecture, Sizes

SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_architecture(directory: Path) -> Architecture:
    """Read ``config.json``. Raises `ConfigError` for what the Megatron model could not honour."""
    raw = read_json(directory / "config.json")
    sizes = _sizes(directory, raw)
    rotary = read_rotary(f"{directory}/config.json", raw, FAMILIES[raw["architectures"][0]].rotary)
    inv_freq = tuple(rotary.inverse_frequencies(sizes.head_dim).tolist())
    return Architecture(**vars(sizes), rope_inv_freq=inv_freq, rope_scale=rotary.scale, rotary=rotary)


def read_sizes(directory: Path) -> Sizes:
    """The same without the rotary embedding, and as strict."""
    return _sizes(directory, read_json(directory / "config.json"))


def _sizes(directory: Path, raw: dict[str, Any]) -> Sizes:
    where = f"{directory}/config.json"
    names = raw.get("architectures") or ["none"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ConfigError(f"{where}: expected architectures to be a list of names, found {names!r}")
    if names[0] not in FAMILIES:
        raise ConfigError(f"{where}: architecture {names[0]}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[names[0]]
    if raw.get("model_type", family.name) != family.name:
        raise ConfigError(f"{where}: expected model_type to be {family.name!r}, found {raw['model_type']!r:.80}")
    _refuse_unsupported(directory, raw, family)
    given = {key: whole(where, raw, key) for key in SIZE_KEYS}
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    positions = whole(where, raw, "max_position_embeddings", 32768)
    sizes = Sizes(
        family=family.name,
        hidden=hidden,
        ffn=given["intermediate_size"],
        layers=given["num_hidden_layers"],
        heads=heads,
        # Where the keys are absent or null, what transformers assumes.
        kv_heads=whole(where, raw, "num_key_value_heads", heads),
        head_dim=whole(where, raw, "head_dim", family.head_dim or hidden // heads),
        vocab=given["vocab_size"],
        norm_eps=number(where, raw, "rms_norm_eps", 1e-6),
        tied=truth(where, raw, "tie_word_embeddings"),
        max_positions=_longest(read_rotary(where, raw, family.rotary), positions),
        initializer_range=number(where, raw, "initializer_range", 0.02),
        experts=read_experts(where, raw, given["num_hidden_layers"]) if family.mixture else None,
    )
    if heads % sizes.kv_heads:
        raise ConfigError(f"{where}: expected num_key_value_heads to divide {heads}, found {sizes.kv_heads}")
    if sizes.head_dim % 2 or not sizes.head_dim:
        raise ConfigError(f"{where}: expected heads of an even size, found head_dim {sizes.head_dim}")
    if truth(where, raw, "attention_bias") and not parts_of(sizes).holds(QKV_BIAS):
        raise ConfigError(f"{where}: attention_bias is true: biases on {family.name} attention are not supported")
    return sizes


def ask_transformers(directory: Path) -> None:
    """Whether it takes ``config.json``, of which it reads more keys than we do: the tokenizer and vLLM ask it too.

    Raises `ConfigError`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{directory}/config.json: transformers refuses this: {said}") from error


def _longest(rotary: Rotary, longest: int) -> int:
    """Positions that the rotary embedding is made for, as vLLM derives them: scaled where the checkpoint scales it."""
    factor = rotary.numbers.get("factor", 1.0)
    if rotary.kind == "yarn":
        return int(rotary.numbers["original_max_position_embeddings"] * factor)
    return int(longest * factor) if rotary.kind == "linear" else longest


def _layer_types(where: str, raw: dict[str, Any]) -> list[Any]:
    found = raw.get("layer_types", ["sliding_attention"])
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise ConfigError(f"{where}: expected layer_types to be a list of names, found {found!r:.80}")
    return found or ["sliding_attention"]


def _refuse_unsupported(directory: Path, raw: dict[str, Any], family: Family) -> None:
    where = f"{directory}/config.json"
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {raw['hidden_act']!r}; supported: 'silu'")
    if truth(where, raw, "mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias is true: biases in the MLP are not supported")
    layer_types = _layer_types(where, raw)
    if truth(where, raw, "use_sliding_window") and "sliding_attention" in layer_types:
        raise ConfigError(f"{where}: use_sliding_window is true: sliding-window attention is not supported")
    window = raw.get("sliding_window", family.window) if family.windowed else None
    positions = whole(where, raw, "max_position_embeddings", 32768)
    if number(where, {"sliding_window": window}, "sliding_window", positions) < positions:
        raise ConfigError(
            f"{where}: sliding_window {window} is less than max_position_embeddings: "
            "sliding-window attention is not supported"
        )
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: the checkpoint is quantised; training needs bf16, fp16 or fp32 weights")
