"""Mistral, without a sliding window."""

from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.family import Family

FAMILY = Family("mistral", decoder_parts, windowed=True, window=4096)  # the window of Mistral 7B v0.1
