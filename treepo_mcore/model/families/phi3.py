"""Phi-3 and Phi-4: q, k and v are one tensor of the checkpoint, gate and up another. `longrope` is refused, and so
is `yarn`, which transformers takes for it."""

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family, Parts
from treepo_mcore.model.sizes import Sizes


def _parts(sizes: Sizes) -> Parts:
    return decoder_parts(sizes, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


FAMILY = Family("phi3", _parts, windowed=True, rotary=("default",))
