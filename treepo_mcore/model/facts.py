"""Facts that several rooms count with."""

from __future__ import annotations

ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
FP8_BLOCK = 128  # side of a block of weights that shares one FP8 scale
ACTOR_VOCAB_UNIT = 128  # Megatron pads vocabulary rows to a multiple of this times actor.tp
ENGINE_VOCAB_UNIT = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE: rows are padded to a multiple, then split evenly


def padded(rows: int, unit: int) -> int:
    """Rounded up to a multiple."""
    return -(-rows // unit) * unit
