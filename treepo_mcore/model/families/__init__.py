"""The families that we know, by the first entry of `architectures` in config.json."""

from __future__ import annotations

from functools import cache

from treepo_mcore.model.families import llama, mistral, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe
from treepo_mcore.model.family import Family, Parts
from treepo_mcore.model.sizes import Sizes

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen2MoeForCausalLM": qwen2_moe.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
}
_NAMED = {family.name: family for family in FAMILIES.values()}


@cache
def parts_of(sizes: Sizes) -> Parts:
    """All parts of a model of these sizes."""
    return _NAMED[sizes.family].parts(sizes)
