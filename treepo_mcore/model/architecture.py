"""What a Hugging Face directory says about its model: sizes, rotary embedding, files.

Everything later (Megatron's model, vLLM's model, the weight layouts) reads this one description.
A family that is not in `FAMILIES`, or a feature that the Megatron model would silently ignore, is refused here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo_mcore.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    import torch

FAMILIES = {
    # architecture -> (family, biases on q/k/v by default, RMSNorm on the heads of q and k)
    "Qwen2ForCausalLM": ("qwen2", True, False),
    "Qwen3ForCausalLM": ("qwen3", False, True),
    "LlamaForCausalLM": ("llama", False, False),
    "MistralForCausalLM": ("mistral", False, False),
}
SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the sequence's length


@dataclass(frozen=True)
class Sizes:
    """A dense decoder as its checkpoint describes it, of the whole model, not of a shard.

    All that planning on paper needs; reading it takes no torch.
    """

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    initializer_range: float

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def split_problem(self, tp: int) -> str | None:
        """Why `tp` tensor-parallel ranks, of Megatron or of vLLM, cannot share the model; None when they can."""
        for what, count in (("attention heads", self.heads), ("FFN width", self.ffn)):
            if count % tp:
                return f"does not divide the model's {what} of {count}"
        if self.kv_heads % tp and tp % self.kv_heads:
            return f"and the model's {self.kv_heads} key/value heads: neither divides the other"
        return None

    def check_split(self, key: str, tp: int) -> None:
        """Raise `ConfigError` naming the key when there is a `split_problem`."""
        if why := self.split_problem(tp):
            raise ConfigError(f"{key}: {tp} {why}")


@dataclass(frozen=True)
class Architecture(Sizes):
    """With the rotary embedding: all that the model needs."""

    rope_inv_freq: tuple[float, ...]  # [head_dim / 2]
    rope_scale: float  # factor on cosine and sine (YaRN's attention factor)


def resolve_model(config: ModelConfig, weights: bool = True) -> Path:
    """The local directory of a model: the path itself, or a hub name's snapshot through huggingface_hub.

    weights: have the hub's weights too, not only what describes them. Honours HF_HUB_OFFLINE and the hub's cache.
    Raises `ConfigError` when neither is there.
    """
    directory = Path(config.path)
    if directory.is_dir():
        return directory
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path: {config.path}: no such directory (and not a hub name like org/model)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors share no base class; all mean "not to be had"
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ConfigError(
            f"model.path: {config.path} at revision {config.revision or 'main'} is neither a directory nor "
            f"to be had from the hub{offline}: {type(error).__name__}"
        ) from error


def read_architecture(directory: Path) -> Architecture:
    """Read ``config.json``. Raises `ConfigError` for what the Megatron model could not honour."""
    raw = _read_json(directory / "config.json")
    sizes = _sizes(directory, raw)
    inv_freq, scale = _rope(directory, raw, sizes.head_dim)
    return Architecture(**vars(sizes), rope_inv_freq=tuple(inv_freq.tolist()), rope_scale=scale)


def read_sizes(directory: Path) -> Sizes:
    """The same without the rotary embedding, and as strict."""
    return _sizes(directory, _read_json(directory / "config.json"))


def _sizes(directory: Path, raw: dict[str, Any]) -> Sizes:
    names = raw.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise ConfigError(f"{directory}/config.json: architecture {names[0]}; supported: {', '.join(FAMILIES)}")
    family, bias_default, qk_norm = FAMILIES[names[0]]
    _refuse_unsupported(directory, raw, family)
    given = {key: _size(directory, raw, key) for key in SIZE_KEYS}
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    return Sizes(
        family=family,
        hidden=hidden,
        ffn=given["intermediate_size"],
        layers=given["num_hidden_layers"],
        heads=heads,
        # Where the keys are absent or null, what transformers assumes.
        kv_heads=_size(directory, raw, "num_key_value_heads", heads),
        head_dim=_size(directory, raw, "head_dim", 128 if family == "qwen3" else hidden // heads),
        vocab=given["vocab_size"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        qkv_bias=bias_default,
        qk_norm=qk_norm,
        tied=raw.get("tie_word_embeddings", False),
        max_positions=_longest(raw, _size(directory, raw, "max_position_embeddings", 32768)),
        initializer_range=raw.get("initializer_range", 0.02),
    )


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


def weight_files(directory: Path) -> dict[str, Path]:
    """HF tensor name -> safetensors file, from the index or the single file; every header is checked.

    Raises `ConfigError` naming a file that is missing or shorter than its header says.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise ConfigError(f"{index}: expected a weight_map from tensors to files, found {placed!r}")
        where = {name: directory / file for name, file in placed.items()}
    elif single.is_file():
        where = dict.fromkeys(safetensors_header(single), single)
    else:
        raise ConfigError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")
    headers = {file: safetensors_header(file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in headers[file]:
            raise ConfigError(f"{file}: the index places {name} here, but the file does not hold it")
    return where


def safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets}; checks that the file is as long as its header says."""
    if not file.is_file():
        raise ConfigError(f"{file}: missing weight file")
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{file}: truncated safetensors file ({size} bytes, header alone needs {length + 8})")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise ConfigError(f"{file}: not a safetensors file: its header is not valid JSON") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ConfigError(f"{file}: truncated safetensors file (found {size} bytes, expected {end})")
    return header


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_unsupported(directory: Path, raw: dict[str, Any], family: str) -> None:
    where = f"{directory}/config.json"
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {raw['hidden_act']!r}; supported: 'silu'")
    if family != "qwen2" and raw.get("attention_bias"):
        raise ConfigError(f"{where}: attention_bias is true: biases on {family} attention are not supported")
    if raw.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias is true: biases in the MLP are not supported")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor {raw['partial_rotary_factor']}; supported: 1.0")
    if raw.get("use_sliding_window") and "sliding_attention" in raw.get("layer_types", ["sliding_attention"]):
        raise ConfigError(f"{where}: use_sliding_window is true: sliding-window attention is not supported")
    # What transformers assumes where the key is absent: the window of Mistral 7B v0.1.
    window = raw.get("sliding_window", 4096) if family == "mistral" else None
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
