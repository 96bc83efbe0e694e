"""The sizes of a dense decoder."""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mcore.config import ConfigError
from treepo_mcore.model.rotary import Rotary


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
    rotary: Rotary  # what both follow from
