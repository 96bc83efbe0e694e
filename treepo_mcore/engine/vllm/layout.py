"""The layout of a vLLM model: which box of which HF tensor each of its parameters holds on one rank of an engine.

Llama, Mistral, Qwen2 and Qwen3 in vLLM 0.26 share one set of names. Facts of vLLM that this file owns: ``qkv_proj``
holds this rank's query heads, then its key heads, then its value heads; with fewer key/value heads than ranks, runs
of neighbouring ranks hold the same head; ``gate_up_proj`` holds gate rows above up rows; vocabulary rows are padded
to a multiple of 64 and then split evenly; `fp8_per_block` adds a float32 ``_scale_inv`` to every linear weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.architecture import Architecture
from treepo_mcore.model.facts import ENGINE_VOCAB_UNIT, padded
from treepo_mcore.weights.fp8 import FP8, SCALE, fp8_parameters, scale_shape
from treepo_mcore.weights.layout import Piece, rows

LINEAR = ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight")  # what vLLM quantises


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

    def parameters(self) -> dict[str, Tensor]:
        """Parameters of the model that vLLM builds on this rank, by name. Within `groups`."""
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        self.config.compilation_config.static_forward_context.clear()  # of the model built before
        with set_default_torch_dtype(self.config.model_config.dtype), torch.device("meta"):
            model = initialize_model(self.config)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if self.quantised:  # what vLLM leaves of weights that are nowhere here
            for name in [name for name in parameters if name.endswith(LINEAR)]:
                scales = scale_shape(tuple(parameters[name].shape))
                parameters[name] = parameters[name].to(FP8)
                parameters[name + SCALE] = torch.empty(scales, dtype=torch.float32, device="meta")
        return parameters


def vllm_layout(parameters: dict[str, Tensor], arch: Architecture, tp: int, tp_rank: int) -> list[Piece]:
    """Pieces of all parameters of one rank of an engine over `tp` ranks.

    parameters: the real model's, by name. Raises `ValueError` naming a parameter that the table does not know, that
    the model lacks, or whose shape is another (an engine that repacks its weights shows empty ones).
    """
    expected = vllm_shapes(arch, tp)
    expected |= {name + SCALE: scale_shape(expected[name]) for name in fp8_parameters(parameters) if name in expected}
    for name in parameters.keys() - expected.keys():
        raise ValueError(f"vLLM parameter {name}: not in the layout of the {arch.family} family")
    for name, shape in expected.items():
        if name not in parameters:
            raise ValueError(f"vLLM parameter {name}: expected by the {arch.family} layout, absent from the model")
        found = tuple(parameters[name].shape)
        if found != shape:
            raise ValueError(f"vLLM parameter {name}: shape {list(found)}, the layout implies {list(shape)}")
    return list(vllm_pieces(arch, tp, tp_rank))


def fp8_shapes(arch: Architecture, tp: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `fp8_per_block` quantises on one rank of an engine, from the sizes alone."""
    return {name: shape for name, shape in vllm_shapes(arch, tp).items() if name.endswith(LINEAR)}


def vllm_padding(parameters: dict[str, Tensor], arch: Architecture, tp: int, tp_rank: int) -> list[Tensor]:
    """Views of the vocabulary rows that no HF row fills; vLLM's own loader writes zeros there."""
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    used = _vocab_rows(arch, tp, tp_rank)
    return [parameters[name][used:] for name in names if name in parameters and used < len(parameters[name])]


def vllm_shapes(arch: Architecture, tp: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of one rank with its shape; all ranks of an engine are alike.

    Raises `ConfigError` for sizes that vLLM cannot split over `tp` ranks.
    """
    _check_divisible(arch, tp)
    hidden, head = arch.hidden, arch.head_dim
    queries, ffn = arch.heads // tp * head, arch.ffn // tp
    fused = queries + 2 * _local_kv_heads(arch, tp) * head
    vocab = (_padded_vocab(arch) // tp, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
    for layer in range(arch.layers):
        p = f"model.layers.{layer}."
        shapes[p + "self_attn.qkv_proj.weight"] = (fused, hidden)
        if arch.qkv_bias:
            shapes[p + "self_attn.qkv_proj.bias"] = (fused,)
        if arch.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (head,)
            shapes[p + "self_attn.k_norm.weight"] = (head,)
        shapes[p + "self_attn.o_proj.weight"] = (hidden, queries)
        shapes[p + "mlp.gate_up_proj.weight"] = (2 * ffn, hidden)
        shapes[p + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[p + "input_layernorm.weight"] = (hidden,)
        shapes[p + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied:
        shapes["lm_head.weight"] = vocab
    return shapes


def vllm_pieces(arch: Architecture, tp: int, tp_rank: int) -> Iterator[Piece]:
    """The same as `vllm_layout`, from the sizes alone."""
    yield from _vocab_pieces("model.embed_tokens.weight", arch, tp, tp_rank)
    for layer in range(arch.layers):
        yield from _layer_pieces(f"model.layers.{layer}.", arch, tp, tp_rank)
    yield _whole("model.norm.weight", arch.hidden)
    if not arch.tied:
        yield from _vocab_pieces("lm_head.weight", arch, tp, tp_rank)


def _layer_pieces(p: str, arch: Architecture, tp: int, tp_rank: int) -> Iterator[Piece]:
    hidden, head = arch.hidden, arch.head_dim
    queries, ffn = arch.heads // tp * head, arch.ffn // tp
    yield _whole(p + "input_layernorm.weight", hidden)
    yield from _qkv_pieces(p, "weight", hidden, arch, tp, tp_rank)
    if arch.qkv_bias:
        yield from _qkv_pieces(p, "bias", None, arch, tp, tp_rank)
    if arch.qk_norm:
        yield _whole(p + "self_attn.q_norm.weight", head)
        yield _whole(p + "self_attn.k_norm.weight", head)
    yield _columns(p + "self_attn.o_proj.weight", hidden, queries, tp_rank)
    yield _whole(p + "post_attention_layernorm.weight", hidden)
    fused = p + "mlp.gate_up_proj.weight"
    yield rows(p + "mlp.gate_proj.weight", tp_rank * ffn, ffn, hidden, fused, 0)
    yield rows(p + "mlp.up_proj.weight", tp_rank * ffn, ffn, hidden, fused, ffn)
    yield _columns(p + "mlp.down_proj.weight", hidden, ffn, tp_rank)


def _qkv_pieces(p: str, kind: str, width: int | None, arch: Architecture, tp: int, tp_rank: int) -> Iterator[Piece]:
    fused = f"{p}self_attn.qkv_proj.{kind}"
    queries = arch.heads // tp * arch.head_dim
    count = _local_kv_heads(arch, tp)
    # With fewer heads than ranks, tp / kv_heads neighbouring ranks share one.
    first = tp_rank * count if arch.kv_heads >= tp else tp_rank // (tp // arch.kv_heads)
    begin, size = first * arch.head_dim, count * arch.head_dim
    yield rows(f"{p}self_attn.q_proj.{kind}", tp_rank * queries, queries, width, fused, 0)
    yield rows(f"{p}self_attn.k_proj.{kind}", begin, size, width, fused, queries)
    yield rows(f"{p}self_attn.v_proj.{kind}", begin, size, width, fused, queries + size)


def _vocab_pieces(name: str, arch: Architecture, tp: int, tp_rank: int) -> Iterator[Piece]:
    count = _vocab_rows(arch, tp, tp_rank)
    if count:
        yield rows(name, tp_rank * (_padded_vocab(arch) // tp), count, arch.hidden, name, 0)


def _whole(name: str, size: int) -> Piece:
    return rows(name, 0, size, None, name, 0)


def _columns(name: str, height: int, width: int, tp_rank: int) -> Piece:
    return Piece(name, (0, tp_rank * width), (height, width), name, (0, 0))


def _local_kv_heads(arch: Architecture, tp: int) -> int:
    return max(1, arch.kv_heads // tp)


def _padded_vocab(arch: Architecture) -> int:
    return padded(arch.vocab, ENGINE_VOCAB_UNIT)


def _vocab_rows(arch: Architecture, tp: int, tp_rank: int) -> int:
    """Rows of the rank's vocabulary shard that the checkpoint has."""
    share = _padded_vocab(arch) // tp
    return max(0, min(arch.vocab, (tp_rank + 1) * share) - tp_rank * share)


def _check_divisible(arch: Architecture, tp: int) -> None:
    arch.check_split("rollout.tp", tp)
    if _padded_vocab(arch) % tp:
        raise ConfigError(f"rollout.tp: {tp} does not divide the model's padded vocabulary of {_padded_vocab(arch)}")
