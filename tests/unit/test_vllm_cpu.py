"""Seeded draws on a CPU: the right distribution, and a function of the request's own seed."""

import torch

from treepo_mcore.engine.vllm.cpu import draw

LOGITS = torch.tensor([2.0, 0.5, float("-inf"), -1.0, 0.0, -4.0, float("-inf")])


def generators(*seeds):
    return {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}


def test_frequencies_are_the_probabilities():
    count = 40_000
    logprobs = LOGITS.log_softmax(-1).expand(count, -1)
    found = draw(logprobs, generators(*range(count))).bincount(minlength=len(LOGITS))
    expected = count * LOGITS.softmax(-1)
    possible = expected > 0
    assert not found[~possible].any()
    chi_square = ((found - expected) ** 2 / expected)[possible].sum()
    assert chi_square < 18.5  # 0.1 % of such draws are above, four degrees of freedom
    rare = torch.full((1, 200_000), -12.0).index_fill(1, torch.tensor([0]), 5.0).log_softmax(-1)
    many = draw(rare.expand(500, -1), generators(*range(500)))
    assert 0.0 < (many > 0).float().mean() < 0.02  # their mass is 0.83 %


def test_a_row_depends_on_its_own_seed_and_on_its_place_in_the_answer():
    logprobs = torch.randn(3, 100).log_softmax(-1)
    together, alone = generators(5, 6, 7), generators(6)
    first, second = draw(logprobs, together), draw(logprobs, together)
    assert [int(draw(logprobs[1:2], alone)) for _ in range(2)] == [int(first[1]), int(second[1])]
    assert first.dtype == torch.int64
    many = {int(draw(logprobs[:1], {0: together[0]})) for _ in range(50)}
    assert len(many) > 10


def test_rows_without_a_seed_leave_the_others_theirs():
    logprobs = torch.randn(2, 100).log_softmax(-1)
    alone = [int(draw(logprobs[1:], generators(9))) for _ in range(5)]
    seeded = {1: torch.Generator().manual_seed(9)}
    torch.manual_seed(0)
    assert int(draw(logprobs, seeded)[1]) == alone[0]
