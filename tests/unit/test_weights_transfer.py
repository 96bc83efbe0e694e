"""Checksums do not depend on where or in which order words lie, and see every byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mcore.weights.transfer import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def tensor_of(shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 5), st.integers(0, 9), st.sampled_from(DTYPES))
def test_a_view_and_its_packed_copy_agree(height, width, row, column, dtype):
    whole = tensor_of((height + row, width + column + 3), dtype)
    view = whole[row:, column : column + width]
    packed = torch.empty(view.numel() + 1, dtype=dtype)[1:].view(view.shape)  # starts in the middle of a word
    packed.view(torch.uint8).copy_(view.contiguous().view(torch.uint8))
    assert checksum(view) == checksum(packed) == checksum(view.clone(memory_format=torch.contiguous_format))
    backwards = packed.view(torch.uint8).flip(0).view(dtype)  # rows from last to first
    assert checksum(backwards) == checksum(view)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (16,), (3, 5), (4, 8)])
def test_every_bit_counts(shape, dtype):
    original = tensor_of(shape, dtype)
    before = checksum(original)
    for byte in range(original.numel() * original.element_size()):
        for bit in range(8):
            damaged = original.clone()
            damaged.view(torch.uint8).view(-1)[byte] ^= 1 << bit
            assert checksum(damaged) != before
