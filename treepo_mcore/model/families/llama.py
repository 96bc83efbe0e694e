"""Llama 2 and 3."""

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("llama", decoder_parts)
