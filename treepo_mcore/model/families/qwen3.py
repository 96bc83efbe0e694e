"""Qwen3, dense."""

from functools import partial

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen3", partial(decoder_parts, qk_norm=True), head_dim=128)
