"""The sizes of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mcore.config import ConfigError
from treepo_mcore.model.rotary import Rotary


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that takes the MLP's place in some layers."""

    count: int
    topk: int  # experts that compute a token
    ffn: int  # width of one expert
    normalised: bool  # whether the weights of a token's experts add up to one
    sparse: tuple[bool, ...]  # by layer: whether it has experts, or an MLP as a dense model has it
    shared: int = 0  # width of an expert that computes every token, behind a sigmoid gate; 0: there is none

    def split_problem(self, ep: int, etp: int) -> str | None:
        """Why `ep` ranks cannot share the experts and `etp` ranks each of them; None when they can."""
        if self.count % ep:
            return f"{ep} does not divide the model's {self.count} experts"
        if self.ffn % etp:
            return f"{etp} does not divide the experts' FFN width of {self.ffn}"
        return None


@dataclass(frozen=True)
class Sizes:
    """A decoder as its checkpoint describes it, of the whole model, not of a shard.

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
    experts: Experts | None = None

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has experts; `ffn` is then the width of no layer."""
        return self.experts is not None and all(self.experts.sparse)

    def split_problem(self, tp: int) -> str | None:
        """Why `tp` tensor-parallel ranks, of Megatron or of vLLM, cannot share the model; None when they can.

        Experts are not looked at: see `Experts.split_problem`.
        """
        widths = {"attention heads": self.heads, "FFN width": 0 if self.all_sparse else self.ffn}
        if self.experts:
            widths["shared expert's FFN width"] = self.experts.shared
        for what, count in widths.items():
            if count % tp:
                return f"does not divide the model's {what} of {count}"
        if self.kv_heads % tp and tp % self.kv_heads:
            return f"and the model's {self.kv_heads} key/value heads: neither divides the other"
        return None

    def check_split(self, key: str, tp: int) -> None:
        """Raise `ConfigError` naming the key when there is a `split_problem`."""
        if why := self.split_problem(tp):
            raise ConfigError(f"{key}: {tp} {why}")

    def check_engine_split(self, tp: int, expert_parallel: bool) -> None:
        """Raise `ConfigError` where `tp` ranks of an engine cannot have as much of everything.

        expert_parallel: each has some experts, and not a part of each.
        """
        self.check_split("rollout.tp", tp)
        ranks = (tp, 1) if expert_parallel else (1, tp)
        if self.experts and (why := self.experts.split_problem(*ranks)):
            raise ConfigError(f"rollout.tp: {why}")


@dataclass(frozen=True, kw_only=True)
class Architecture(Sizes):
    """With the rotary embedding: all that the model needs."""

    rope_inv_freq: tuple[float, ...]  # [head_dim / 2]
    rope_scale: float  # factor on cosine and sine (YaRN's attention factor)
    rotary: Rotary  # what both follow from
