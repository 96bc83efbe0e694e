"""Architecture -> Megatron-Core GPT model, and the pass-through settings.

On a GPU the layers are TransformerEngine's where it is installed; elsewhere they are Megatron's own.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from treepo_mcore.actor.attention import TreeAttention, choose_attention
from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.precision import precision_fields
from treepo_mcore.config import ActorConfig, ConfigError, did_you_mean
from treepo_mcore.model.decoder import Q_NORM, QKV_BIAS
from treepo_mcore.model.facts import ACTOR_VOCAB_UNIT, padded
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.shards import check_layout
from treepo_mcore.model.sizes import Architecture, Experts
from treepo_mcore.system.machine import Machine, this_machine

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_MODEL = "model.path"
_BALANCE = "nothing: the loss is the objective's alone, and no token may lose an expert that the engine gave it"
_NO_FSDP = "nothing: Megatron's FSDP is not supported"
_OTHER_MODEL = "nothing: the engine would sample from another model than the actor trains"

# Fields that the trainer sets itself -> the key to use instead.
OF_THE_TRAINER = {
    "tensor_model_parallel_size": "actor.tp",
    "pipeline_model_parallel_size": "actor.pp",
    "virtual_pipeline_model_parallel_size": "actor.vpp",
    "num_layers_in_first_pipeline_stage": "actor.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "actor.last_stage_layers",
    "sequence_parallel": "actor.sequence_parallel",
    "context_parallel_size": "actor.cp",
    "hierarchical_context_parallel_sizes": "actor.cp",
    "hybrid_context_parallel": "actor.cp",
    "expert_model_parallel_size": "actor.ep",
    "expert_tensor_parallel_size": "actor.etp",
    "num_moe_experts": _MODEL,
    "moe_router_topk": _MODEL,
    "moe_ffn_hidden_size": _MODEL,
    "moe_layer_freq": _MODEL,
    "moe_router_pre_softmax": _MODEL,
    "moe_router_score_function": _MODEL,
    "moe_router_num_groups": _MODEL,
    "moe_router_group_topk": _MODEL,
    "moe_router_topk_scaling_factor": _MODEL,
    "moe_router_enable_expert_bias": _MODEL,
    "moe_shared_expert_intermediate_size": _MODEL,
    "moe_shared_expert_gate": _MODEL,
    "moe_latent_size": _OTHER_MODEL,
    "moe_router_load_balancing_type": _BALANCE,
    "moe_aux_loss_coeff": _BALANCE,
    "moe_z_loss_coeff": _BALANCE,
    "moe_input_jitter_eps": _BALANCE,
    "moe_router_force_load_balancing": _BALANCE,
    "moe_router_force_biased": _BALANCE,
    "moe_expert_capacity_factor": _BALANCE,
    "moe_pad_expert_input_to_capacity": _BALANCE,
    "moe_token_dispatcher_type": "nothing: trees differ in tokens, which only alltoall takes",
    "moe_grouped_gemm": "nothing: on with TransformerEngine's layers, which alone have it",
    "moe_single_grouped_weight": "nothing: pushes read each expert's weight",
    "use_megatron_fsdp": _NO_FSDP,
    "use_custom_fsdp": _NO_FSDP,
    "bf16": "actor.dtype",
    "fp16": "actor.dtype",
    "params_dtype": "actor.dtype",
    "pipeline_dtype": "actor.dtype",
    "recompute_granularity": "actor.recompute",
    "lr": "actor.optimizer.lr",
    "min_lr": "actor.optimizer.min_lr",
    "weight_decay": "actor.optimizer.weight_decay",
    "clip_grad": "actor.optimizer.clip_grad",
    "adam_beta1": "actor.optimizer.betas",
    "adam_beta2": "actor.optimizer.betas",
    "adam_eps": "actor.optimizer.eps",
    "use_distributed_optimizer": "actor.optimizer.distributed",
    "optimizer": "nothing: the optimizer is Adam",
    "num_layers": _MODEL,
    "hidden_size": _MODEL,
    "ffn_hidden_size": _MODEL,
    "num_attention_heads": _MODEL,
    "num_query_groups": _MODEL,
    "kv_channels": _MODEL,
    "layernorm_epsilon": _MODEL,
    "normalization": _MODEL,
    "gated_linear_unit": _MODEL,
    "activation_func": _MODEL,
    "add_bias_linear": _MODEL,
    "add_qkv_bias": _MODEL,
    "qk_layernorm": _MODEL,
    "init_method_std": _MODEL,
    "layernorm_zero_centered_gamma": _MODEL,
    "rotary_interleaved": _MODEL,
    "activation_func_clamp_value": _OTHER_MODEL,
    "apply_query_key_layer_scaling": _OTHER_MODEL,
    "apply_residual_connection_post_layernorm": _OTHER_MODEL,
    "attention_output_gate": _OTHER_MODEL,
    "experimental_attention_variant": _OTHER_MODEL,
    "glu_linear_offset": _OTHER_MODEL,
    "linear_attention_freq": _OTHER_MODEL,
    "mtp_num_layers": _OTHER_MODEL,
    "multi_latent_attention": _OTHER_MODEL,
    "no_rope_freq": _OTHER_MODEL,
    "qk_l2_norm": _OTHER_MODEL,
    "softmax_scale": _OTHER_MODEL,
    "softmax_type": _OTHER_MODEL,
    "use_mup": _OTHER_MODEL,
    "window_attn_skip_freq": _OTHER_MODEL,
    "window_size": _OTHER_MODEL,
    "attention_backend": "actor.attention",
    "fp8_dot_product_attention": "nothing: attention stays in actor.dtype",
    "fp8_multi_head_attention": "nothing: attention stays in actor.dtype",
    "calculate_per_token_loss": "actor.loss.aggregation",
    "variable_seq_lengths": "actor.packing (packed sequences always vary)",
    "attention_dropout": "nothing: ratios need the same network in every pass",
    "hidden_dropout": "nothing: ratios need the same network in every pass",
}


@dataclasses.dataclass(frozen=True)
class MegatronConfigs:
    """Megatron's own three configuration objects, and whether its layers are TransformerEngine's."""

    transformer: TransformerConfig
    optimizer: OptimizerConfig
    ddp: DistributedDataParallelConfig
    te_layers: bool = False


@on_megatron_device
def megatron_configs(actor: ActorConfig, arch: Architecture, machine: Machine | None = None) -> MegatronConfigs:
    """Everything Megatron is told. machine: to plan for; default: this one.

    Raises `ConfigError` for unknown or owned keys, for what Megatron refuses and for what the machine cannot run.
    """
    machine = machine or this_machine()
    choose_attention(actor.attention, machine.has_gpu)
    extra = _sort_pass_through(actor.megatron)
    precision = _sort_pass_through(precision_fields(actor, arch, machine))
    dtype = DTYPES[actor.dtype]
    check_layout(arch, actor)
    try:
        configs = MegatronConfigs(
            TransformerConfig(
                **(
                    _transformer_fields(actor, arch, dtype)
                    | _expert_fields(actor, arch.experts, machine)
                    | _fusions(machine)
                    | precision[TransformerConfig]
                    | extra[TransformerConfig]
                )
            ),
            OptimizerConfig(**(_optimizer_fields(actor, dtype) | precision[OptimizerConfig] | extra[OptimizerConfig])),
            DistributedDataParallelConfig(
                **(
                    {"grad_reduce_in_fp32": True, "use_distributed_optimizer": actor.optimizer.distributed}
                    | extra[DistributedDataParallelConfig]
                )
            ),
            machine.te_layers,
        )
        _check_stages(configs.transformer)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"actor: Megatron-Core refuses this: {' '.join(str(error).split())}") from error
    if configs.ddp.overlap_param_gather and not actor.optimizer.distributed:
        raise ConfigError("actor.megatron.overlap_param_gather: needs actor.optimizer.distributed")
    if configs.transformer.gradient_accumulation_fusion and not machine.fused_wgrad:
        raise ConfigError(
            "actor.megatron.gradient_accumulation_fusion: the output layer needs apex's extension "
            "fused_weight_gradient_mlp_cuda, which is not installed (treepo-mcore doctor)"
        )
    return configs


def _check_stages(config: TransformerConfig) -> None:
    """Raise now what Megatron would raise while it builds."""
    if config.pipeline_model_parallel_layout is None:
        for stage in range(config.pipeline_model_parallel_size):
            get_num_layers_to_build(config, vp_stage=0, pp_rank=stage)


def _transformer_fields(actor: ActorConfig, arch: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return recompute[actor.recompute] | {
        "num_layers": arch.layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "layernorm_epsilon": arch.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": parts_of(arch).holds(QKV_BIAS),
        "qk_layernorm": parts_of(arch).holds(Q_NORM),
        "init_method_std": arch.initializer_range,
        "tensor_model_parallel_size": actor.tp,
        "pipeline_model_parallel_size": actor.pp,
        "virtual_pipeline_model_parallel_size": actor.vpp,
        "num_layers_in_first_pipeline_stage": actor.first_stage_layers,
        "num_layers_in_last_pipeline_stage": actor.last_stage_layers,
        "context_parallel_size": actor.cp,
        "sequence_parallel": actor.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Packed sequences differ in length; Megatron ties this flag to the dispatcher even for dense models.
        "variable_seq_lengths": actor.pp > 1 and not actor.vpp,
        # Interleaved stages send forward and backward at once. In one batch, or when shapes are exchanged, two
        # messages between the same two ranks (pp = 2) would be taken for each other.
        "overlap_p2p_comm": bool(actor.vpp),
        "batch_p2p_comm": not actor.vpp,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Every weight is loaded from the checkpoint.
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
    }


def _expert_fields(actor: ActorConfig, experts: Experts | None, machine: Machine) -> dict[str, Any]:
    if experts is None:
        return {}
    shared = {"moe_shared_expert_intermediate_size": experts.shared, "moe_shared_expert_gate": True}
    return (shared if experts.shared else {}) | {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": [int(sparse) for sparse in experts.sparse],
        # The softmax of the chosen logits alone is the softmax of all, normalised over the chosen.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": machine.te_layers,
        "expert_model_parallel_size": actor.ep,
        "expert_tensor_parallel_size": actor.etp,
    }


def _fusions(machine: Machine) -> dict[str, bool]:
    """Megatron's fused kernels, where they can run. Fused Adam and norms it takes from TransformerEngine by itself."""
    return {
        # TransformerEngine's layers could add gradients up by themselves, but Megatron ties the output layer to it.
        "gradient_accumulation_fusion": machine.has_gpu and machine.fused_wgrad,
        "bias_activation_fusion": machine.has_gpu,
        "bias_dropout_fusion": machine.has_gpu,
        # Of Megatron's own attention and apex's own norm, which are not in the model.
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _optimizer_fields(actor: ActorConfig, dtype: torch.dtype) -> dict[str, Any]:
    optimizer = actor.optimizer
    return {
        "optimizer": "adam",
        "lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_eps": optimizer.eps,
        "clip_grad": optimizer.clip_grad,
        "use_distributed_optimizer": optimizer.distributed,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }


def _sort_pass_through(settings: dict[str, Any]) -> dict[type, dict[str, Any]]:
    """`actor.megatron` split over the configuration classes that have each field; some fields are in two."""
    classes: list[Any] = [TransformerConfig, OptimizerConfig, DistributedDataParallelConfig]
    fields = {cls: {field.name: field for field in dataclasses.fields(cls)} for cls in classes}
    known = sorted(set().union(*fields.values()))
    result: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in settings.items():
        if key in OF_THE_TRAINER:
            raise ConfigError(f"actor.megatron.{key}: set by the trainer; use {OF_THE_TRAINER[key]}")
        if key not in known:
            raise ConfigError(f"unknown key actor.megatron.{key}{did_you_mean(key, known, 'actor.megatron.')}")
        for cls in classes:
            if key in fields[cls]:
                result[cls][key] = _typed(key, value, typing.get_type_hints(cls)[key])
    return result


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """A YAML value as the field's annotation wants it; dtypes are written as names, 1e-5 may come as a string."""
    kinds = {annotation, *typing.get_args(annotation)}
    if torch.dtype in kinds and isinstance(value, str):
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"actor.megatron.{key}: expected the name of a torch dtype, found {value!r}")
        return dtype
    if isinstance(value, bool) and bool not in kinds:  # which pydantic would take for 0 or 1
        raise ConfigError(f"actor.megatron.{key}: input should not be a boolean, found {value!r}")
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise ConfigError(f"actor.megatron.{key}: {said[0].lower()}{said[1:]}, found {value!r}") from error


class RMSNorm(nn.Module):
    """Megatron's own torch norm refuses sequence parallelism; this one only needs the weight marked for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class TreeGPTModel(GPTModel):
    """GPTModel whose rotary angles follow the positions of a packed tree instead of 0, 1, 2, ..."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        out = list(super()._preprocess(*args, **kwargs))
        out[1] = out[1].index_select(0, kwargs["packed_seq_params"].positions)  # [max, 1, 1, d] -> [S, 1, 1, d]
        return tuple(out)


def padded_vocab(vocab: int, tp: int) -> int:
    """Rows of the embedding in Megatron's habit: a multiple of 128 x tp."""
    return padded(vocab, ACTOR_VOCAB_UNIT * tp)


def build_model(configs: MegatronConfigs, arch: Architecture) -> list[nn.Module]:
    """This rank's model chunks (one, or `actor.vpp`), weights not yet loaded."""
    config = configs.transformer
    chunks: list[nn.Module] = []
    for stage in _virtual_stages(config):
        model = _build_chunk(config, arch, stage, configs.te_layers)
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


@on_megatron_device
def build_meta_model(configs: MegatronConfigs, arch: Architecture) -> list[nn.Module]:
    """The chunks of `build_model` on the meta device, unwrapped: names, shapes and dtypes that take no memory.

    Planned for a machine with TransformerEngine on one without it, the layers are Megatron's own: the same parameters,
    some under other names. FP8 is how layers compute; their parameters stay in `actor.dtype`.
    """
    config = copy.copy(configs.transformer)
    config.use_cpu_initialization = True  # otherwise Megatron names the CUDA device itself
    config.fp8, config.fp8_param = None, False
    te_layers = configs.te_layers and this_machine().te_layers
    with torch.device("meta"):
        return [_build_chunk(config, arch, stage, te_layers) for stage in _virtual_stages(config)]


def _virtual_stages(config: TransformerConfig) -> Iterable[int | None]:
    stages = config.virtual_pipeline_model_parallel_size
    return range(stages) if stages else [None]


def unwrap(chunk: nn.Module) -> TreeGPTModel:
    """The GPT model under Megatron's data-parallel and precision wrappers."""
    while not isinstance(chunk, TreeGPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _build_chunk(config: TransformerConfig, arch: Architecture, stage: int | None, te_layers: bool) -> TreeGPTModel:
    first, count = get_transformer_layer_offset(config, vp_stage=stage), get_num_layers_to_build(config, vp_stage=stage)
    make, norm = (_te_layer, _te_norm()) if te_layers else (_local_layer, RMSNorm)
    sparse = arch.experts.sparse if arch.experts else (False,) * arch.layers
    layers = [make(arch, arch.experts if has_experts else None) for has_experts in sparse[first : first + count]]
    spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
    model = TreeGPTModel(
        config,
        spec,
        padded_vocab(arch.vocab, config.tensor_model_parallel_size),
        arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=arch.tied,
        vp_stage=stage,
    )
    # Vocabulary rows beyond the checkpoint's are never loaded. Their logits are masked, but in the backward pass zero
    # times what happened to be in that memory can be NaN.
    for parameter in model.parameters():
        if not is_float8tensor(parameter):  # the weights of linear layers only, which are loaded whole
            parameter.data.zero_()
    _set_rotary(model, arch)
    return model


def _local_layer(arch: Architecture, experts: Experts | None) -> ModuleSpec:
    """A layer of Megatron's own modules."""
    qk_norm = parts_of(arch).holds(Q_NORM)
    count = experts.count if experts else None
    parts = get_gpt_layer_local_submodules(num_experts=count, normalization="RMSNorm", qk_layernorm=qk_norm)
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if qk_norm else {}
    parts = dataclasses.replace(
        parts,
        self_attention=_tree_attention(parts.self_attention, **norms),
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
    )
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def _te_layer(arch: Architecture, experts: Experts | None) -> ModuleSpec:
    """The same of TransformerEngine's: norms are fused into the linear layer behind them, but for that of experts."""
    count, qk_norm = experts.count if experts else None, parts_of(arch).holds(Q_NORM)
    parts = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=count, moe_grouped_gemm=experts is not None, qk_layernorm=qk_norm
    )
    parts = dataclasses.replace(parts, self_attention=_tree_attention(parts.self_attention))
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _tree_attention(attention: ModuleSpec, **slots: Any) -> ModuleSpec:
    """With our attention, and other modules in the slots."""
    submodules = dataclasses.replace(attention.submodules, core_attention=TreeAttention, **slots)
    return ModuleSpec(module=attention.module, params=attention.params, submodules=submodules)


def _set_rotary(model: TreeGPTModel, arch: Architecture) -> None:
    # Megatron knows fixed llama3 constants and its own YaRN; the checkpoint's numbers are put in their place.
    model.rotary_pos_emb.inv_freq = torch.tensor(
        arch.rope_inv_freq, dtype=torch.float32, device=model.rotary_pos_emb.inv_freq.device
    )
    assert hasattr(model.rotary_pos_emb, "cp_group"), "Megatron renamed its group"
    model.rotary_pos_emb.cp_group = None  # or its table would be cut as Megatron cuts a sequence: positions pick rows
    for layer in model.decoder.layers:
        assert hasattr(layer.self_attention, "_yarn_concentration_factor"), "Megatron renamed its rotary factor"
        layer.self_attention._yarn_concentration_factor = arch.rope_scale
