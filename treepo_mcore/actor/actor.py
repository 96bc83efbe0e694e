"""The policy: log-probs of packed trees and optimizer steps, on Megatron's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import Fp8Recipe
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from treepo_mcore.actor.attention import attention_multiple, choose_attention
from treepo_mcore.actor.balance import ExpertLoad
from treepo_mcore.actor.batch import MicroBatch, Shares, empty_sequence, micro_batch
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.layout import is_expert, megatron_layout, megatron_parameters, megatron_tensors
from treepo_mcore.actor.log_probs import edge_log_probs
from treepo_mcore.actor.memory import ActorMemory, HostTensors
from treepo_mcore.actor.model import DTYPES, MegatronConfigs, build_model, megatron_configs
from treepo_mcore.actor.parallel import Grid
from treepo_mcore.actor.precision import token_multiple
from treepo_mcore.actor.quantised import PlainCopies
from treepo_mcore.config import ActorConfig
from treepo_mcore.model.shards import token_work
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.records import EdgeValues, Objective, PackedSequence
from treepo_mcore.weights.hf import load_pieces
from treepo_mcore.weights.layout import Piece


class Actor:
    """A sharded policy and its optimizer.

    Every method is collective over the model's tensor and pipeline groups, and with experts over all ranks that have a
    part of them: also ranks without sequences take part.
    """

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
        learns: bool = True,
    ) -> None:
        """Build the model, load `directory` into it, make the optimizer.

        temperature divides the logits, so that log-probs are of the distribution the engine samples from. learns: False
        for an actor without gradients, optimizer and reference, whose weights are only read.
        """
        self.config, self.arch, self.grid = config, arch, grid
        self.temperature = temperature
        self.dtype = DTYPES[config.dtype]
        configs = megatron_configs(config, arch)
        bare = build_model(configs, arch)
        self.pieces: list[Piece] = megatron_layout(bare, arch, grid.place)
        self.copies = PlainCopies(megatron_parameters(bare))
        self.tensors: dict[str, Tensor] = megatron_tensors(bare) | self.copies.tensors
        self._read_weights(directory)
        self.copies.write()
        self.megatron = configs.transformer
        self.implementation = choose_attention(config.attention, torch.cuda.is_available())
        self.shares = Shares(grid.cp, grid.cp_rank, token_work(arch))
        self.chunks: list[Any] = bare
        self.optimizer: Any = None
        self.reference: HostTensors | None = None
        self.set_aside: HostTensors | None = None
        if not learns:
            self.memory = ActorMemory([], None, megatron_parameters(bare))
            return
        self.chunks = _data_parallel(bare, configs)
        # The distributed optimizer moves parameters into one buffer: look them up again.
        self.tensors = megatron_tensors(self.chunks) | self.copies.tensors
        self.load = ExpertLoad(self.chunks)
        self.optimizer = get_megatron_optimizer(configs.optimizer, self.chunks)
        self.memory = ActorMemory(self.chunks, self.optimizer, megatron_parameters(self.chunks))
        self.scheduler = _scheduler(self.optimizer, config, total_steps)
        _connect(configs, self.chunks, self.optimizer)
        # In host memory, so the policy as loaded stays known when a checkpoint or an update changes the tensors.
        if config.reference == "host":
            self.reference = HostTensors(self.tensors)
            self.set_aside = HostTensors(self.tensors)  # while the reference is in
        # Otherwise the first forward pass would begin with a gather, which ranks without trees do not take part in.
        self.finish_updates()

    @torch.no_grad()
    def _read_weights(self, directory: Path) -> None:
        """One replica reads the files and the others get its weights: a file system serves every byte once a job."""
        groups = {
            False: parallel_state.get_data_parallel_group(with_context_parallel=True),
            True: parallel_state.get_expert_data_parallel_group(),
        }
        read = [piece for piece in self.pieces if groups[is_expert(piece.local)].rank() == 0]
        if read:
            load_pieces(directory, read, self.tensors)
        for name in sorted({piece.local for piece in self.pieces}):
            group = groups[is_expert(name)]
            if group.size() > 1:
                dist.broadcast(self.tensors[name], dist.get_global_rank(group, 0), group=group)

    @on_megatron_device
    @torch.no_grad()
    def log_probs(self, sequences: list[PackedSequence]) -> list[Tensor]:
        """Log-probs and entropies, float32 [2, E] for each sequence, the same on all ranks of the model."""
        most = self._most(len(sequences), backward=False)
        if not most:
            return []
        batches = self._micro_batches(sequences, least=most)
        outputs = self._run(batches, None)
        results = []
        for index, sequence in enumerate(sequences):
            out = torch.zeros(2, len(sequence.target), device=self._device())
            if outputs:
                edges = batches[index].edges
                out[:, edges] = outputs[index][:, : len(edges)]
                if self.grid.cp > 1:
                    dist.all_reduce(out, group=parallel_state.get_context_parallel_group())
            if self.grid.pp > 1:
                last = parallel_state.get_pipeline_model_parallel_last_rank()
                dist.broadcast(out, last, group=parallel_state.get_pipeline_model_parallel_group())
            results.append(out)
        return results

    @torch.no_grad()
    def reference_log_probs(self, sequences: list[PackedSequence]) -> list[Tensor]:
        """Log-probs under the reference policy, float32 [E] for each sequence, the same on all ranks of the model.

        Its weights and the actor's change places for the pass. Needs `actor.reference: host`.
        """
        assert self.reference is not None, "actor.reference: none"
        assert self.set_aside is not None
        self.set_aside.take(self.tensors)
        try:
            self.reference.give(self.tensors)
            return [output[0] for output in self.log_probs(sequences)]
        finally:
            self.set_aside.give(self.tensors)

    @on_megatron_device
    def update(
        self,
        sequences: list[PackedSequence],
        old_logp: list[Tensor] | None,
        objective: Objective,
        *,
        reference_logp: list[Tensor] | None = None,
        normaliser: float | None = None,
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of a mini-batch (an empty share is fine).

        The loss is the sum over all edges of all ranks divided by the normaliser, by default the sum of their weights:
        with weights of one the mean over logical tokens. Returns metrics, the same on every rank. Call `finish_updates`
        behind the last one. Where the gradient is not finite nothing is stepped, on any rank, and `skipped` is 1.0.
        old_logp, reference_logp: float32 [E] for each sequence; old_logp is None for an objective that takes no ratios.
        """
        batches = self._micro_batches(
            sequences, old_logp, reference_logp, least=self._most(len(sequences), backward=True)
        )
        if normaliser is None:
            # 1 where no rank has an edge
            normaliser = (
                self.sum_over_replicas(sum(float(s.weight.sum(dtype=torch.float64)) for s in sequences))[0] or 1.0
            )
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.load.clear()
        outputs = self._run(batches, partial(_loss, objective, normaliser), objective.entropy_grad)
        # As `step` does by itself, which would not look before it moves the weights.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skips = not math.isfinite(grad_norm)
        if not skips:
            self.optimizer.step()
        measured = objective.means(self._totals(outputs, objective)) | self.load.metrics()
        return measured | {"grad_norm": grad_norm, "skipped": float(skips)}

    @on_megatron_device
    def finish_updates(self) -> None:
        """Make `tensors` whole behind the last `update`, before anybody but the next one reads them. Collective.

        Under `overlap_param_gather` Megatron gathers the parameters of the distributed optimizer behind the next
        forward pass; until then a rank has only its own share of the new values.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def readable(self) -> AbstractContextManager[None]:
        """Scope in which all of `tensors` can be read; outside of it those of FP8 parameters have no memory."""
        return self.copies.readable()

    def set_step(self, step: int) -> None:
        """Learning rate of rollout step `step`, counted from 0; warm-up begins above zero."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=step + 1)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _needed(self, count: int) -> int:
        """Micro-batches that a schedule runs for `count` sequences, the rest of them empty.

        At least one, since every rank takes part in an update; with interleaved stages a multiple of the stages, as
        Megatron's schedule asks.
        """
        unit = self.grid.pp if self.config.vpp else 1
        return -(-max(count, 1) // unit) * unit

    def _most(self, count: int, backward: bool) -> int:
        """Sequences of the data-parallel rank that has most, where all must run as many micro-batches; else `count`.

        They must with experts, to which tokens of all ranks travel, and under TransformerEngine's delayed scaling,
        which meets the other ranks in every micro-batch that has a backward pass. Ranks with fewer sequences then run
        empty ones.
        """
        delayed = backward and self.megatron.fp8 and self.megatron.fp8_recipe == Fp8Recipe.delayed
        if not delayed and self.arch.experts is None:
            return count
        most = torch.tensor(count, device=self._device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
        return int(most)

    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def sum_over_replicas(self, *mine: float) -> list[float]:
        """Of the numbers that each data-parallel rank has from its share."""
        total = torch.tensor(mine, dtype=torch.float64, device=self._device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.tolist()

    def _micro_batches(
        self,
        sequences: list[PackedSequence],
        old_logp: Sequence[Tensor] | None = None,
        reference_logp: Sequence[Tensor] | None = None,
        least: int = 1,
    ) -> list[MicroBatch]:
        """With as many empty ones as the schedule needs; at least `least` in all."""
        nothing: list[Tensor | None] = [None] * len(sequences)
        rows = list(zip(sequences, old_logp or nothing, reference_logp or nothing, strict=True))
        empty = (empty_sequence(), torch.zeros(1), None)
        rows += [empty] * (self._needed(max(least, len(rows))) - len(rows))
        multiple = token_multiple(vars(self.megatron)) * (self.grid.tp if self.config.sequence_parallel else 1)
        multiple = math.lcm(multiple, attention_multiple(self.implementation))
        shares = [self.shares.of(row[0]) for row in rows]
        if self.config.vpp:  # no shapes are exchanged (see `megatron_configs`): all become as long as the longest
            multiple *= -(-max(len(share.own) for share in shares) // multiple)
        settings: Any = {"multiple": multiple, "implementation": self.implementation, "device": self._device()}
        return [
            micro_batch(sequence, share, *log_probs, **settings)
            for (sequence, *log_probs), share in zip(rows, shares, strict=True)
        ]

    def _run(self, batches: list[MicroBatch], loss: Callable[..., Any] | None, entropy_grad: bool = False) -> list[Any]:
        """Forward, and backward from `loss` if there is one; returns what each micro-batch gave on the last stage."""
        iterators = [iter(batches) for _ in self.chunks]
        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=partial(self._forward, loss or _output, entropy_grad),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            # Only used by virtual stages, which divide it by the ranks that share it; others exchange shapes.
            seq_length=len(batches[0].sequence.tokens) * self.grid.cp,
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )

    def _forward(
        self, loss: Callable[..., Any], entropy_grad: bool, iterator: Iterator[MicroBatch], model: nn.Module
    ) -> tuple[Any, Any]:
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
                "entropy_grad": entropy_grad,
            },
        )
        return output, partial(loss, batch)

    def _totals(self, outputs: list[Tensor], objective: Objective) -> Tensor:
        """Of what the objective measured, over the whole mini-batch. Only one rank of each replica holds its share."""
        added, largest = len(objective.sums), len(objective.maxima)
        total = torch.zeros(added + largest, dtype=torch.float64, device=self._device())
        if self.grid.leads_model:
            stacked = torch.stack(outputs)
            total = torch.cat([stacked[:, :added].sum(0), stacked[:, added:].amax(0)])
        dist.all_reduce(total[:added])
        dist.all_reduce(total[added:], op=dist.ReduceOp.MAX)
        return total


def _loss(objective: Objective, normaliser: float, batch: MicroBatch, output: Tensor) -> tuple[Tensor, ...]:
    """In the form of Megatron's loss functions: the loss, a token count (see `_connect`), and what to collect."""
    logp, entropy = output
    loss, sums = objective(EdgeValues(batch.sequence, logp, entropy, batch.old_logp, batch.reference_logp), normaliser)
    return loss, torch.ones_like(loss, dtype=torch.int), sums


def _output(batch: MicroBatch, output: Tensor, non_loss_data: bool) -> Tensor:
    return output


def _data_parallel(chunks: list[nn.Module], configs: MegatronConfigs) -> list[DistributedDataParallel]:
    # Where the groups of experts are those of everything else Megatron makes one optimizer of both, whose checkpoint
    # has other names than that of two and does not load elsewhere: always two.
    for name, parameter in megatron_parameters(chunks).items():
        if is_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
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
        lr_decay_steps=max(total_steps, settings.warmup_steps) + 1,  # the last step still learns at min_lr = 0
        lr_decay_style=settings.lr_decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )


def _connect(configs: MegatronConfigs, chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """The hooks that Megatron's own training loop sets on its configuration."""
    config = configs.transformer
    # `calculate_per_token_loss` makes Megatron add up gradients over ranks instead of averaging them. It would then
    # divide by an integer count of tokens; our losses come divided by a normaliser that need not be one.
    config.finalize_model_grads_func = lambda model, count, **kw: finalize_model_grads(model, None, **kw)
    config.grad_scale_func = optimizer.scale_loss
    if configs.ddp.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        if configs.ddp.align_param_gather:
            config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    if configs.ddp.overlap_param_gather and configs.ddp.align_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in chunks])


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items
