"""Qwen3, mixtures of experts."""

from functools import partial

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen3_moe", partial(decoder_parts, qk_norm=True), mixture=True)
