"""Qwen3, dense."""

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen3", decoder_parts, qk_norm=True, head_dim=128)
