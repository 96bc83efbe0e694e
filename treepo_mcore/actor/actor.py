"""The policy: log-probs of packed trees and optimizer steps, on Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from treepo_mcore.actor.attention import Implementation
from treepo_mcore.actor.batch import MicroBatch, empty_sequence, micro_batch
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.loss import edge_log_probs, nll_loss, policy_loss
from treepo_mcore.actor.model import DTYPES, MegatronConfigs, build_model, megatron_configs
from treepo_mcore.actor.parallel import Grid
from treepo_mcore.architecture import Architecture
from treepo_mcore.config import ActorConfig
from treepo_mcore.tree.packing import PackedSequence
from treepo_mcore.weights.hf import load_pieces
from treepo_mcore.weights.layout import Piece
from treepo_mcore.weights.megatron import megatron_layout, megatron_tensors

Objective = Literal["policy", "supervised"]

# Sums over edges, each counted once per leaf, collected during an update.
SUMS = ("tokens", "loss", "entropy", "approx_kl", "clipped", "ratio")


class Actor:
    """A sharded policy and its optimizer. Every method is collective over the model's tensor and pipeline groups."""

    @on_megatron_device
    def __init__(
        self,
        config: ActorConfig,
        arch: Architecture,
        directory: Path,
        grid: Grid,
        *,
        temperature: float,
        total_steps: int,
    ) -> None:
        """Build the model, load `directory` into it, make the optimizer.

        temperature divides the logits, so that log-probs are of the distribution the engine samples from.
        """
        self.config, self.arch, self.grid = config, arch, grid
        self.temperature = temperature
        self.dtype = DTYPES[config.dtype]
        configs = megatron_configs(config, arch)
        bare = build_model(configs, arch)
        self.pieces: list[Piece] = megatron_layout(bare, arch, grid.tp_rank)
        self.tensors: dict[str, Tensor] = megatron_tensors(bare)
        load_pieces(directory, arch, self.pieces, self.tensors)
        self.chunks = _data_parallel(bare, configs)
        # The distributed optimizer moves parameters into one buffer: look them up again.
        self.tensors = megatron_tensors(self.chunks)
        self.optimizer = get_megatron_optimizer(configs.optimizer, self.chunks)
        self.scheduler = _scheduler(self.optimizer, config, total_steps)
        _connect(configs, self.chunks, self.optimizer)
        self.megatron = configs.transformer
        self.implementation: Implementation = "chain" if config.attention == "chain" else "dense"
        if config.attention == "auto" and not torch.cuda.is_available():
            self.implementation = "chain"

    @on_megatron_device
    @torch.no_grad()
    def log_probs(self, sequences: list[PackedSequence]) -> list[Tensor]:
        """Log-probs and entropies, float32 [2, E] for each sequence, the same on all ranks of the model."""
        if not sequences:
            return []
        outputs = self._run(self._micro_batches(sequences, [None] * len(sequences)), forward_only=True)
        results = []
        for index, sequence in enumerate(sequences):
            edges = len(sequence.target)
            out = outputs[index] if outputs else torch.empty(2, edges, device=self._device())
            if self.grid.pp > 1:
                last = parallel_state.get_pipeline_model_parallel_last_rank()
                dist.broadcast(out, last, group=parallel_state.get_pipeline_model_parallel_group())
            results.append(out)
        return results

    @on_megatron_device
    def update(
        self, sequences: list[PackedSequence], old_logp: list[Tensor] | None, objective: Objective = "policy"
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of a mini-batch (an empty share is fine).

        The loss is the mean over all logical tokens of the mini-batch, over all ranks. Returns its metrics, the
        same on every rank. old_logp: float32 [E] for each sequence; None for the supervised objective.
        """
        olds: list[Tensor | None] = list(old_logp) if old_logp is not None else [None] * len(sequences)
        batches = self._micro_batches(sequences, olds)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batches, forward_only=False, objective=objective)
        _, grad_norm, _ = self.optimizer.step()
        return self._metrics(outputs, float(grad_norm))

    def set_step(self, step: int) -> None:
        """Learning rate of rollout step `step`, counted from 0; warm-up begins above zero."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=step + 1)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _missing(self, count: int) -> int:
        """Empty micro-batches needed: at least one, and a multiple of the stages when they are interleaved."""
        unit = self.grid.pp if self.config.vpp else 1
        return -max(count, 1) % unit + (count == 0)

    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def _micro_batches(self, sequences: list[PackedSequence], old_logp: Sequence[Tensor | None]) -> list[MicroBatch]:
        """With as many empty ones as the schedule needs."""
        missing = self._missing(len(sequences))
        sequences = sequences + [empty_sequence()] * missing
        olds = [*old_logp, *[torch.zeros(1)] * missing]
        multiple = self.grid.tp if self.config.sequence_parallel else 1
        if self.config.vpp:  # no shapes are exchanged (see `megatron_configs`): all become as long as the longest
            multiple *= -(-max(len(s.tokens) for s in sequences) // multiple)
        settings: Any = {"multiple": multiple, "implementation": self.implementation, "device": self._device()}
        return [micro_batch(s, old, **settings) for s, old in zip(sequences, olds, strict=True)]

    def _run(self, batches: list[MicroBatch], *, forward_only: bool, objective: Objective = "policy") -> list[Any]:
        iterators = [iter(batches) for _ in self.chunks]
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=partial(self._forward, objective),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=len(batches[0].sequence.tokens),  # only used by virtual stages; others exchange shapes
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward(self, objective: Objective, iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        sequence = batch.sequence
        output = model(
            input_ids=sequence.tokens[None],
            position_ids=sequence.positions[None],
            attention_mask=None,
            packed_seq_params=batch.attention,
            output_processor=edge_log_probs,
            output_processor_context={
                "source": sequence.source,
                "target": sequence.target,
                "temperature": self.temperature,
                "vocab": self.arch.vocab,
            },
        )
        return output, partial(self._loss, objective, batch)

    def _loss(self, objective: Objective, batch: MicroBatch, output: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return output
        logp, entropy = output
        s = batch.sequence
        tokens = s.multiplicity.sum().to(torch.int)
        if objective == "supervised":
            loss = nll_loss(logp, s.multiplicity)
            old = logp.detach()
        else:
            assert batch.old_logp is not None
            old = batch.old_logp
            loss = policy_loss(logp, old, s.adv_pos, s.adv_neg, entropy, s.multiplicity, self.config.loss)
        return loss, tokens, self._sums(loss, logp.detach(), old, entropy.detach(), s)

    def _sums(self, loss: Tensor, logp: Tensor, old: Tensor, entropy: Tensor, s: PackedSequence) -> Tensor:
        weight = s.multiplicity.float()
        ratio = (logp - old).exp()
        limits = self.config.loss
        clipped = (ratio > 1 + limits.clip_high) & (s.adv_pos > 0) | (ratio < 1 - limits.clip_low) & (s.adv_neg < 0)
        return torch.stack(
            [
                weight.sum(),
                loss.detach(),
                (entropy * weight).sum(),
                ((ratio - 1 - (logp - old)) * weight).sum(),
                (clipped * weight).sum(),
                (ratio * weight).sum(),
            ]
        ).double()

    def _metrics(self, outputs: list[Tensor], grad_norm: float) -> dict[str, float]:
        """Token means over the whole mini-batch. Only one rank of each replica holds the sums."""
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self._device())
        if self.grid.leads_model:
            total += torch.stack(outputs).sum(0)
        dist.all_reduce(total)
        values = dict(zip(SUMS, total.tolist(), strict=True))
        tokens = max(values.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in values.items()} | {"grad_norm": grad_norm, "tokens": tokens}


def _data_parallel(chunks: list[nn.Module], configs: MegatronConfigs) -> list[DistributedDataParallel]:
    return [
        DistributedDataParallel(configs.transformer, configs.ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def _scheduler(optimizer: Any, config: ActorConfig, total_steps: int) -> OptimizerParamScheduler:
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.lr_decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )


def _connect(configs: MegatronConfigs, chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """The hooks that Megatron's own training loop sets on its configuration."""
    config = configs.transformer
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if configs.ddp.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        if configs.ddp.align_param_gather:
            config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    if configs.ddp.overlap_param_gather and configs.ddp.align_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in chunks])


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items
