"""Qwen2 and Qwen2.5."""

from functools import partial

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("qwen2", partial(decoder_parts, qkv_bias=True))
