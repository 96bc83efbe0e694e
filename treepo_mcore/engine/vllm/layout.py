"""The layout of a vLLM model: which box of which HF tensor each of its parameters holds on one rank of an engine.

Llama, Mistral, Phi, Qwen2 and Qwen3 in vLLM 0.26 share one set of names. Facts of vLLM that this file owns:
``qkv_proj`` holds this rank's query heads, then its key heads, then its value heads; with fewer key/value heads than
ranks, runs of neighbouring ranks hold the same head; ``gate_up_proj`` holds gate rows above up rows; vocabulary rows
are padded to a multiple of 64 and then split evenly; `fp8_per_block` adds a float32 ``_scale_inv`` to every linear
weight; experts lie one behind the other in one tensor, each cut as an MLP is, or with expert parallelism runs of them
whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.facts import ENGINE_VOCAB_UNIT, padded
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.family import Part
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.weights.fp8 import FP8, SCALE, fp8_parameters, scale_shape
from treepo_mcore.weights.layout import Piece, rows


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What vLLM says to its arguments, as one line of ours: raises `ConfigError`."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"rollout: vLLM refuses this: {' '.join(str(error).split())}") from error


class MetaEngine:
    """vLLM's own process groups and model class, without an engine: what one rank would hold, on the meta device.

    For a rank of a job that exists on paper (`plan.paper.fake_rank`). vLLM is imported here, not above: the layouts
    do not need it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        """arguments: those of `vllm.LLM`. Raises `ConfigError` for what vLLM refuses."""
        from vllm.engine.arg_utils import EngineArgs

        with refusals():
            self.config = EngineArgs(**arguments).create_engine_config()
        self.quantised = self.config.quant_config is not None
        # Otherwise vLLM looks for a kernel that this processor has. It quantises after loading: until then, parameters
        # are those of a model that is not quantised.
        self.config.quant_config = None

    @contextlib.contextmanager
    def groups(self) -> Iterator[None]:
        """Scope with vLLM's groups of this rank. They cannot communicate: vLLM's communicators need the other ranks."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import parallel_state

        make_group = parallel_state.init_model_parallel_group

        def silent(group_ranks: Any, local_rank: int, backend: str, group_name: str, **unused: Any) -> Any:
            return make_group(group_ranks, local_rank, backend, group_name=group_name, use_device_communicator=False)

        everyone = list(range(dist.get_world_size()))
        parallel_state._WORLD = parallel_state.init_world_group(everyone, 0, dist.get_backend())
        parallel_state.init_model_parallel_group = silent
        try:
            with set_current_vllm_config(self.config):
                parallel_state.initialize_model_parallel(self.config.parallel_config.tensor_parallel_size)
                yield
        finally:
            parallel_state.init_model_parallel_group = make_group
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None

    def parameters(self, arch: Sizes) -> dict[str, Tensor]:
        """Parameters of the model that vLLM builds on this rank, by name. Within `groups`."""
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        self.config.compilation_config.static_forward_context.clear()  # of the model built before
        with set_default_torch_dtype(self.config.model_config.dtype), _untold_experts(), torch.device("meta"):
            model = initialize_model(self.config)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if self.quantised:  # what vLLM leaves of weights that are nowhere here
            for name in fp8_shapes(arch, self.config.parallel_config.tensor_parallel_size):
                scales = scale_shape(tuple(parameters[name].shape))
                parameters[name] = parameters[name].to(FP8)
                parameters[name + SCALE] = torch.empty(scales, dtype=torch.float32, device="meta")
        return parameters


@contextlib.contextmanager
def _untold_experts() -> Iterator[None]:
    """vLLM logs which experts a rank has, which a map on the meta device does not say."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    told = ExpertMapManager.get_compressed_map_string
    ExpertMapManager.get_compressed_map_string = lambda manager: ""
    try:
        yield
    finally:
        ExpertMapManager.get_compressed_map_string = told


def vllm_layout(
    parameters: dict[str, Tensor], arch: Sizes, tp: int, tp_rank: int, expert_parallel: bool = False
) -> list[Piece]:
    """Pieces of all parameters of one rank of an engine over `tp` ranks.

    parameters: the real model's, by name. expert_parallel: as `RolloutConfig` has it. Raises `ValueError` naming a
    parameter that the table does not know, that the model lacks, or whose shape is another (an engine that repacks its
    weights shows empty ones).
    """
    expected = vllm_shapes(arch, tp, expert_parallel)
    expected |= {name + SCALE: scale_shape(expected[name]) for name in fp8_parameters(parameters) if name in expected}
    for name in parameters.keys() - expected.keys():
        raise ValueError(f"vLLM parameter {name}: not in the layout of the {arch.family} family")
    for name, shape in expected.items():
        if name not in parameters:
            raise ValueError(f"vLLM parameter {name}: expected by the {arch.family} layout, absent from the model")
        found = tuple(parameters[name].shape)
        if found != shape:
            raise ValueError(f"vLLM parameter {name}: shape {list(found)}, the layout implies {list(shape)}")
    return list(vllm_pieces(arch, tp, tp_rank, expert_parallel))


def fp8_shapes(arch: Sizes, tp: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `fp8_per_block` quantises on one rank of an engine, from the sizes alone."""
    _check_divisible(arch, tp, expert_parallel=False)
    return {name: part.engine_shape(tp, arch.head_dim) for name, _, part in _named_parts(arch) if part.quantised}


def vllm_padding(parameters: dict[str, Tensor], arch: Sizes, tp: int, tp_rank: int) -> list[Tensor]:
    """Views of the vocabulary rows that no HF row fills; vLLM's own loader writes zeros there."""
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    used = _vocab_rows(arch, tp, tp_rank)
    return [parameters[name][used:] for name in names if name in parameters and used < len(parameters[name])]


def vllm_shapes(arch: Sizes, tp: int, expert_parallel: bool = False) -> dict[str, tuple[int, ...]]:
    """Every parameter of one rank with its shape; all ranks of an engine are alike.

    Raises `ConfigError` for sizes that vLLM cannot split over `tp` ranks, and for experts that it could not give each
    rank as many of.
    """
    _check_divisible(arch, tp, expert_parallel)
    return {name: part.engine_shape(tp, arch.head_dim, expert_parallel) for name, _, part in _named_parts(arch)}


def vllm_pieces(arch: Sizes, tp: int, tp_rank: int, expert_parallel: bool = False) -> Iterator[Piece]:
    """The same as `vllm_layout`, from the sizes alone."""
    for name, prefix, part in _named_parts(arch):
        if not part.experts:
            yield from _part_pieces(name, prefix, part, arch, tp, tp_rank)
            continue
        count = part.experts // tp if expert_parallel else part.experts
        first, cut = (tp_rank * count, (1, 0)) if expert_parallel else (0, (tp, tp_rank))
        for slab in range(count):
            for piece in _part_pieces(name, prefix, part.of_expert(first + slab), arch, *cut):
                yield replace(piece, local_start=(slab, *piece.local_start))


def _part_pieces(name: str, prefix: str, part: Part, arch: Sizes, tp: int, tp_rank: int) -> Iterator[Piece]:
    if part.cut == "qkv":
        yield from _qkv_pieces(name, prefix, part, arch, tp, tp_rank)
    elif part.cut == "columns":
        (source,), (height, width) = part.sources, part.engine_shape(tp, arch.head_dim)
        yield Piece(prefix + source.tensor, (source.first, tp_rank * width), (height, width), name, (0, 0))
    elif part.cut == "vocabulary":
        (source,), count = part.sources, _vocab_rows(arch, tp, tp_rank)
        if count:
            first = source.first + tp_rank * (padded(arch.vocab, ENGINE_VOCAB_UNIT) // tp)
            yield rows(prefix + source.tensor, first, count, part.width, name, 0)
    else:  # whole, or each source's share below the one before it
        at = 0
        for source in part.sources:
            share = source.rows if part.cut == "whole" else source.rows // tp
            first = source.first if part.cut == "whole" else source.first + tp_rank * share
            yield rows(prefix + source.tensor, first, share, part.width, name, at)
            at += share


def _named_parts(arch: Sizes) -> Iterator[tuple[str, str, Part]]:
    """vLLM's name of every parameter, the prefix of its checkpoint's tensors, and its part."""
    parts = parts_of(arch)
    for part in parts.outer[:1]:
        yield part.vllm, "", part
    for number, layer in enumerate(parts.layers):
        prefix = f"model.layers.{number}."
        for part in layer:
            yield prefix + part.vllm, prefix, part
    for part in parts.outer[1:]:
        yield part.vllm, "", part


def _qkv_pieces(name: str, prefix: str, part: Part, arch: Sizes, tp: int, tp_rank: int) -> Iterator[Piece]:
    q, k, v = part.sources
    queries, count = q.rows // tp, max(1, arch.kv_heads // tp)
    # With fewer heads than ranks, tp / kv_heads neighbouring ranks share one.
    first = tp_rank * count if arch.kv_heads >= tp else tp_rank // (tp // arch.kv_heads)
    begin, size = first * arch.head_dim, count * arch.head_dim
    yield rows(prefix + q.tensor, q.first + tp_rank * queries, queries, part.width, name, 0)
    yield rows(prefix + k.tensor, k.first + begin, size, part.width, name, queries)
    yield rows(prefix + v.tensor, v.first + begin, size, part.width, name, queries + size)


def _vocab_rows(arch: Sizes, tp: int, tp_rank: int) -> int:
    """Rows of the rank's vocabulary shard that the checkpoint has."""
    share = padded(arch.vocab, ENGINE_VOCAB_UNIT) // tp
    return max(0, min(arch.vocab, (tp_rank + 1) * share) - tp_rank * share)


def _check_divisible(arch: Sizes, tp: int, expert_parallel: bool) -> None:
    arch.check_engine_split(tp, expert_parallel)
    vocabulary = padded(arch.vocab, ENGINE_VOCAB_UNIT)
    if vocabulary % tp:
        raise ConfigError(f"rollout.tp: {tp} does not divide the model's padded vocabulary of {vocabulary}")
