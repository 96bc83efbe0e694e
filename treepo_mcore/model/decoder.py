"""The parts of a dense decoder: attention with grouped heads and a gated MLP, as Llama has them."""

from __future__ import annotations

from treepo_mcore.model.family import Part, Parts, Source
from treepo_mcore.model.sizes import Sizes

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
    layer += [
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
        Part(
            "stacked",
            ("mlp.linear_fc1.weight",),
            "mlp.gate_up_proj.weight",
            _fused(gate_up, (sizes.ffn, sizes.ffn), "weight"),
            hidden,
            quantised=True,
        ),
        Part(
            "columns",
            ("mlp.linear_fc2.weight",),
            "mlp.down_proj.weight",
            (Source("mlp.down_proj.weight", hidden),),
            sizes.ffn,
            quantised=True,
        ),
    ]
    return Parts(_outer(sizes), tuple(layer))


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
