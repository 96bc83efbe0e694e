"""The parts of a decoder: attention with grouped heads and a gated MLP, as Llama has them, or experts."""

from __future__ import annotations

from typing import Any

from treepo_mcore.model.family import Part, Parts, Source
from treepo_mcore.model.sizes import Experts, Sizes

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKV_BIAS, Q_NORM = "self_attention.linear_qkv.bias", "self_attention.q_layernorm.weight"  # in Megatron
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def decoder_parts(
    sizes: Sizes,
    *,
    qkv: tuple[str, ...] = QKV,
    gate_up: tuple[str, ...] = GATE_UP,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Parts:
    """qkv, gate_up: the checkpoint's names of what both libraries fuse; one name where the checkpoint fuses it too.
    qk_norm: an RMSNorm on every head of q and k.
    """
    attention = _attention(sizes, qkv, qkv_bias, qk_norm)
    dense = (*attention, *_mlp(gate_up, sizes.ffn, sizes.hidden))
    if sizes.experts is None:
        return Parts(_outer(sizes), (dense,) * sizes.layers)
    sparse = (*attention, *_mixture(sizes.experts, sizes.hidden))
    return Parts(_outer(sizes), tuple(sparse if experts else dense for experts in sizes.experts.sparse))


def _attention(sizes: Sizes, qkv: tuple[str, ...], qkv_bias: bool, qk_norm: bool) -> list[Part]:
    """With both norms of the layer."""
    hidden, head = sizes.hidden, sizes.head_dim
    heads = (sizes.heads * head, sizes.kv_heads * head, sizes.kv_heads * head)
    layer = [
        _norm(
            "input_layernorm.weight", hidden, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
        ),
        Part(
            "qkv",
            ("self_attention.linear_qkv.weight",),
            "self_attn.qkv_proj.weight",
            _fused(qkv, heads, "weight"),
            hidden,
            quantised=True,
        ),
    ]
    if qkv_bias:
        bias = _fused(qkv, heads, "bias")
        layer.append(Part("qkv", (QKV_BIAS,), "self_attn.qkv_proj.bias", bias))
    if qk_norm:
        for letter in "qk":
            megatron, name = f"self_attention.{letter}_layernorm.weight", f"self_attn.{letter}_norm.weight"
            layer.append(_norm(name, head, megatron))
    return [
        *layer,
        Part(
            "columns",
            ("self_attention.linear_proj.weight",),
            "self_attn.o_proj.weight",
            (Source("self_attn.o_proj.weight", hidden),),
            heads[0],
            quantised=True,
        ),
        _norm(
            "post_attention_layernorm.weight", hidden, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        ),
    ]


def _mlp(gate_up: tuple[str, ...], width: int, hidden: int) -> list[Part]:
    down = (Source("mlp.down_proj.weight", hidden),)
    return [
        Part(
            "stacked",
            ("mlp.linear_fc1.weight",),
            "mlp.gate_up_proj.weight",
            _fused(gate_up, (width, width), "weight"),
            hidden,
            quantised=True,
        ),
        Part("columns", ("mlp.linear_fc2.weight",), "mlp.down_proj.weight", down, width, quantised=True),
    ]


def _mixture(experts: Experts, hidden: int) -> list[Part]:
    """The router, the experts, and the one that all tokens go through; as Qwen2-MoE and Qwen3-MoE name them.

    Experts are Megatron's `SequentialMLP` on a CPU and TransformerEngine's grouped products elsewhere.
    """
    each: dict[str, Any] = {"experts": experts.count, "chosen": experts.topk, "quantised": True}
    gate_up, down = (f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up")), "mlp.experts.{}.down_proj.weight"
    parts = [
        Part("whole", ("mlp.router.weight",), "mlp.gate.weight", (Source("mlp.gate.weight", experts.count),), hidden),
        Part(
            "stacked",
            ("mlp.experts.local_experts.{}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{}"),
            "mlp.experts.routed_experts.w13_weight",
            _fused(tuple(gate_up), (experts.ffn, experts.ffn), "weight"),
            hidden,
            **each,
        ),
        Part(
            "columns",
            ("mlp.experts.local_experts.{}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{}"),
            "mlp.experts.routed_experts.w2_weight",
            (Source(down, hidden),),
            experts.ffn,
            **each,
        ),
    ]
    return [*parts, *_shared_expert(experts.shared, hidden)] if experts.shared else parts


def _shared_expert(width: int, hidden: int) -> list[Part]:
    gate_up, down = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), "mlp.shared_expert.down_proj.weight"
    gate = "mlp.shared_expert_gate.weight"
    return [
        Part(
            "stacked",
            ("mlp.shared_experts.linear_fc1.weight",),
            "mlp.shared_expert.gate_up_proj.weight",
            _fused(gate_up, (width, width), "weight"),
            hidden,
            quantised=True,
        ),
        Part(
            "columns",
            ("mlp.shared_experts.linear_fc2.weight",),
            down,
            (Source(down, hidden),),
            width,
            quantised=True,
        ),
        Part("whole", ("mlp.shared_experts.gate_weight",), gate, (Source(gate, 1),), hidden),
    ]


def _outer(sizes: Sizes) -> tuple[Part, ...]:
    """With tied embeddings and a pipeline, the last stage's output layer is a second copy of the embedding."""
    table = "model.embed_tokens.weight"
    inner = ("embedding.word_embeddings.weight",) + (("output_layer.weight",) if sizes.tied else ())
    norm = _norm("model.norm.weight", sizes.hidden, "decoder.final_layernorm.weight")
    embedding = Part("vocabulary", inner, table, (Source(table, sizes.vocab),), sizes.hidden)
    if sizes.tied:
        return embedding, norm
    head = "lm_head.weight"
    return (
        embedding,
        norm,
        Part("vocabulary", ("output_layer.weight",), head, (Source(head, sizes.vocab),), sizes.hidden),
    )


def _norm(name: str, size: int, *megatron: str) -> Part:
    return Part("whole", megatron, name, (Source(name, size),))


def _fused(names: tuple[str, ...], rows: tuple[int, ...], kind: str) -> tuple[Source, ...]:
    """One source for each run of rows: tensors of their own, or runs of one tensor."""
    if len(names) > 1:
        return tuple(Source(f"{name}.{kind}", count) for name, count in zip(names, rows, strict=True))
    return tuple(Source(f"{names[0]}.{kind}", count, sum(rows[:i])) for i, count in enumerate(rows))
