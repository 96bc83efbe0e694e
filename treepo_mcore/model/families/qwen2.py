"""Qwen2 and Qwen2.5."""

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen2", decoder_parts, qkv_bias=True)
