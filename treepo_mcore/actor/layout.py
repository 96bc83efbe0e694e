"""The layout of a Megatron-Core GPT model: which box of which HF tensor each local parameter holds.

Facts of Megatron that this file owns: ``linear_qkv`` rows are interleaved by key/value group (``[q ... q, k, v]``
per group) and split evenly over tensor-parallel ranks, also when groups are fewer than ranks; ``linear_fc1`` holds
this rank's gate rows above its up rows; vocabulary rows are padded; layer numbers in names are local to a stage.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from treepo_mcore.actor.model import unwrap
from treepo_mcore.model.architecture import Architecture
from treepo_mcore.weights.layout import Piece, rows

# Name inside a layer -> what it is. The second spelling of a norm is TransformerEngine's fused one.
LAYER_PARTS = {
    "input_layernorm.weight": "input_norm",
    "self_attention.linear_qkv.layer_norm_weight": "input_norm",
    "pre_mlp_layernorm.weight": "mlp_norm",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm",
    "self_attention.linear_qkv.weight": "qkv",
    "self_attention.linear_qkv.bias": "qkv_bias",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "self_attention.linear_proj.weight": "o_proj",
    "mlp.linear_fc1.weight": "gate_up",
    "mlp.linear_fc2.weight": "down_proj",
}
REPLICATED = {
    "input_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}


def megatron_parameters(chunks: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Local name (``<chunk>.<parameter>``) -> this rank's parameter."""
    return {
        f"{index}.{name}": parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def megatron_tensors(chunks: list[nn.Module]) -> dict[str, Tensor]:
    """The same, detached."""
    return {name: parameter.detach() for name, parameter in megatron_parameters(chunks).items()}


def megatron_layout(chunks: list[nn.Module], arch: Architecture, tp_rank: int) -> list[Piece]:
    """Pieces of all parameters of this rank. A parameter that is not in the table raises KeyError with its name."""
    pieces: list[Piece] = []
    for index, chunk in enumerate(chunks):
        model = unwrap(chunk)
        offset = get_transformer_layer_offset(model.config, vp_stage=model.vp_stage)
        for name, parameter in model.named_parameters():
            pieces += parameter_pieces(arch, name, f"{index}.{name}", tuple(parameter.shape), offset, tp_rank)
    return pieces


def parameter_pieces(
    arch: Architecture, name: str, local: str, shape: tuple[int, ...], offset: int, tp_rank: int
) -> Iterator[Piece]:
    """Pieces of one parameter of a model chunk.

    name: Megatron's, local to the chunk; local: the same with the chunk's number; offset: layers before the chunk.
    """
    if not name.startswith("decoder.layers."):
        yield from _outer_pieces(arch, name, local, shape, tp_rank)
        return
    _, _, number, part_name = name.split(".", 3)
    part = LAYER_PARTS[part_name]
    prefix = f"model.layers.{int(number) + offset}."
    if part in REPLICATED:
        yield rows(prefix + REPLICATED[part], 0, shape[0], None, local, 0)
    elif part in ("qkv", "qkv_bias"):
        kind = "weight" if part == "qkv" else "bias"
        yield from _qkv_pieces(arch, prefix, kind, local, shape, tp_rank)
    elif part == "gate_up":
        half = shape[0] // 2
        yield rows(prefix + "mlp.gate_proj.weight", tp_rank * half, half, shape[1], local, 0)
        yield rows(prefix + "mlp.up_proj.weight", tp_rank * half, half, shape[1], local, half)
    else:
        tensor = prefix + ("self_attn.o_proj.weight" if part == "o_proj" else "mlp.down_proj.weight")
        yield Piece(tensor, (0, tp_rank * shape[1]), shape, local, (0, 0))


def _outer_pieces(arch: Architecture, name: str, local: str, shape: tuple[int, ...], tp_rank: int) -> Iterator[Piece]:
    if name == "decoder.final_layernorm.weight":
        yield rows("model.norm.weight", 0, shape[0], None, local, 0)
        return
    # With tied embeddings and a pipeline, the last stage's output layer is a second copy of the embedding.
    head = "model.embed_tokens.weight" if arch.tied else "lm_head.weight"
    tensor = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": head}[name]
    first = tp_rank * shape[0]
    count = min(arch.vocab, first + shape[0]) - first
    if count > 0:
        yield rows(tensor, first, count, shape[1], local, 0)


def _qkv_pieces(
    arch: Architecture, prefix: str, kind: str, local: str, shape: tuple[int, ...], tp_rank: int
) -> Iterator[Piece]:
    """Intersect this rank's even share of the interleaved rows with the q, k and v runs of every group."""
    head, queries = arch.head_dim, arch.queries_per_group
    width = shape[1] if len(shape) == 2 else None
    low, high = tp_rank * shape[0], (tp_rank + 1) * shape[0]
    for group in range(arch.kv_heads):
        begin = group * (queries + 2) * head
        for letter, at, count, first in (
            ("q", begin, queries * head, group * queries * head),
            ("k", begin + queries * head, head, group * head),
            ("v", begin + (queries + 1) * head, head, group * head),
        ):
            a, b = max(low, at), min(high, at + count)
            if a < b:
                yield rows(f"{prefix}self_attn.{letter}_proj.{kind}", first + a - at, b - a, width, local, a - low)
