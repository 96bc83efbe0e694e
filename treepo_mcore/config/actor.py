"""The policy in Megatron-Core."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from treepo_mcore.config.base import Section
from treepo_mcore.config.learn import LossConfig


class OptimizerConfig(Section):
    """Adam, in Megatron's terms; anything else goes into `actor.megatron`."""

    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # in rollout steps
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, gt=0)
    distributed: bool = True  # Megatron's distributed optimizer

    @model_validator(mode="after")
    def _ranges(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: expected at most lr = {self.lr}, found {self.min_lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), found {list(self.betas)}")
        return self


class ActorConfig(Section):
    """The policy in Megatron-Core: sizes of the process grid and what an update costs."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    vpp: int | None = Field(None, ge=2)  # virtual pipeline stages per rank
    cp: int = Field(1, ge=1)  # context parallel: ranks that share the tokens of each packed sequence
    ep: int = Field(1, ge=1)  # ranks that share the experts of a mixture, in runs of neighbours
    etp: int = Field(1, ge=1)  # ranks that share each expert; actor.tp splits everything else
    first_stage_layers: int | None = Field(None, ge=1)  # uneven pipelines
    last_stage_layers: int | None = Field(None, ge=1)
    sequence_parallel: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of parameters and activations
    # Linear layers in FP8, forward and backward, in the pass for log-probs too; needs TransformerEngine and a GPU that
    # has it. current: one scale a tensor; blockwise: one for 128 elements or 128 x 128. Both leave the first and the
    # last layer in bfloat16 (actor.megatron.first_last_layers_bf16, num_layers_at_start_in_bf16 and ..._at_end_...).
    # Other recipes of Megatron: actor.megatron.fp8 and fp8_recipe. Parameters that are FP8 themselves:
    # actor.megatron.fp8_param and fp8_param_gather, together (docs/gpu.md).
    fp8: Literal["none", "current", "blockwise"] = "none"
    packing: str = "tree"  # flat: every leaf its own copy of the prefix, for comparison; or package.module:name
    # Unique tokens of one packed sequence, at most, of all its actor.cp ranks together; a pipeline with few sequences
    # gets shorter ones, of whole trees.
    micro_batch_tokens: int = Field(8192, ge=1)
    attention: Literal["auto", "dense", "chain", "flex"] = "auto"  # auto: chain on a CPU, flex on a GPU
    recompute: Literal["none", "selective", "full"] = "none"
    # What ratios are taken against. recompute: a pass of the actor before the first update; engine: the log-probs that
    # came with the tokens, which saves that pass.
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    # For the mismatch of engine and actor, with the ratio rho = p(actor) / p(engine) of the old policy. tis: losses
    # times min(rho, threshold); mask: no loss where rho is outside [1 / threshold, threshold]. token: rho of each
    # token; sequence: the product along each leaf's response. With old_logprobs: engine, where rho is in the clipped
    # ratio already and is first known in the update, only token_mask.
    # Also package.module:name, a factor of each token from log rho (docs/extending.md).
    correction: str = "none"
    correction_threshold: float = Field(2.0, gt=1)
    # The run stops beyond this mean |log rho| of a mini-batch, in nats. Default: only the first step of a job is looked
    # at, with a bound that rounding explains: 0.01 in float32, 0.1 in half precision, 0.5 in FP8 (of the key-value
    # cache, too), over rollout.temperature where that is below 1.
    max_mismatch: float | None = Field(None, gt=0)
    # An update whose gradient is not finite is left out; the step is bad after more than so many in a row.
    max_skipped: int = Field(2, ge=0)
    min_entropy: float | None = Field(None, gt=0)  # nats a token, mean of a step; below it the policy has collapsed
    # The policy at the start of the run, for loss.kl_coef. host: its weights wait in host memory, the actor's size
    # once more, and change places with the actor's (another such copy) for its log-probs.
    reference: Literal["none", "host"] = "none"
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    megatron: dict[str, Any] = {}  # any field of Megatron's TransformerConfig, OptimizerConfig or DDP config

    @property
    def replica(self) -> int:
        """Ranks that train on the same trees."""
        return self.tp * self.cp * self.pp

    @property
    def rank_tokens(self) -> int:
        """Of a full micro-batch, on one rank."""
        return -(-self.micro_batch_tokens // self.cp)

    @property
    def least_micro_batches(self) -> int:
        """To aim at, for a data-parallel rank and optimizer step: the bubble is then at most a fifth of the time."""
        return 4 * self.pp if self.pp > 1 else 1

    @model_validator(mode="after")
    def _consistent(self) -> ActorConfig:
        if self.loss.kl_coef and self.reference == "none":
            raise ValueError(f"loss.kl_coef: {self.loss.kl_coef} needs reference: host, found reference: none")
        if self.old_logprobs == "engine" and self.correction not in ("none", "token_mask"):
            raise ValueError(
                f"correction: {self.correction} needs old_logprobs: recompute; with the engine's, the clipped ratio "
                "already carries the importance weight (none or token_mask)"
            )
        return self
