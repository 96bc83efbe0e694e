"""Qwen1.5-MoE and Qwen2, mixtures of experts with one that all tokens go through."""

from functools import partial

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen2_moe", partial(decoder_parts, qkv_bias=True), mixture=True)
