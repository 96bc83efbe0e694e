"""The arithmetic of the report, on plans small enough to do by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treepo_mcore.plan.hardware import GPUS, NETWORKS, Network
from treepo_mcore.plan.reshard import covered_once, describe, reshard_report, staging_used, traffic
from treepo_mcore.system.placement import colocated
from treepo_mcore.weights.layout import Piece, rows
from treepo_mcore.weights.plan import Transfer, make_plan

NODES = [0, 0, 1, 1]
H100, IB400 = GPUS["h100"], NETWORKS["ib400"]


def move(source, target, count, local="w", start=0):
    return Transfer("t", (count, 10), source, "s", (0, 0), target, local, (start, 0))


def job(sources, targets, nodes, numel):
    """What a report needs of a paper job: everything in one engine parameter `w`."""
    grid = SimpleNamespace(tp=1, pp=1, dp=len(nodes))
    return SimpleNamespace(
        nodes=nodes,
        grids=[grid] * len(nodes),
        places=[colocated(rank, len(nodes), 1) for rank in range(len(nodes))],
        parameters=[{"w": torch.empty(numel, dtype=torch.bfloat16, device="meta")}],
        itemsize=2,
        plan=lambda: make_plan(sources, targets, nodes),
        to_fill=lambda rank: {"w": numel} if targets[rank] else {},
    )


def test_bytes_by_link_direction_and_rank():
    plan = [move(0, 0, 1), move(0, 1, 2), move(1, 2, 3), move(1, 3, 4)._replace(form="blocks")]
    table = traffic(plan, NODES, 2)
    assert table[0].tolist() == [[20, 0, 0, 0], [20, 0, 0, 0]]
    assert table[1].tolist() == [[40, 0, 0, 0], [0, 40, 0, 0]]
    assert table[2].tolist() == [[0, 60 + 44, 0, 0], [0, 0, 60, 44]]


@pytest.mark.parametrize(
    ("parts", "covered"),
    [
        ([(0, 3), (3, 2)], True),
        ([(0, 5)], True),
        ([(0, 4)], False),  # a hole
        ([(0, 5), (0, 1)], False),  # more than there is
        ([(0, 3), (2, 2)], False),  # the right count, but twice here and not at all there
    ],
)
def test_covered_once(parts, covered):
    plan = [move(0, 1, count, "w", start) for start, count in parts]
    assert covered_once(plan, {"w": 50}) is covered


def test_a_parameter_that_nothing_writes_is_not_covered():
    assert covered_once([move(0, 1, 5)], {"w": 50, "b": 10}) is False
    assert covered_once([], {}) is True


def test_staging_is_two_halves_of_each_direction():
    one, other, third = [move(0, 2, 4), move(2, 3, 1)], [move(0, 1, 1)], [move(0, 1, 5)]
    # Rank 2 receives 80 bytes and sends 20; rank 0 sends 80, 20 and 100, the first and the last from the same half.
    assert staging_used([one], 4, 2) == 80 + 20
    assert staging_used([one, other], 4, 2) == 80 + 20
    assert staging_used([one, other, third], 4, 2) == 100 + 20
    # Messages begin at multiples of 8: 20 bytes to rank 1, then 20 to rank 2 from byte 24 on.
    assert staging_used([[move(0, 1, 1), move(0, 2, 1)]], 4, 2) == 44
    assert staging_used([], 4, 2) == 0


def test_the_report_of_two_nodes():
    """Rank 0 holds 1000 rows of 10; rank 1 beside it wants 600 and rank 2 on the other node wants all."""
    whole = [rows("t", 0, 1000, 10, "w", 0)]
    targets = [[], [rows("t", 0, 600, 10, "w", 0)], whole]
    three = job([whole, [], []], targets, [0, 0, 1], 10_000)
    three.to_fill = lambda rank: {0: {}, 1: {"w": 6000}, 2: {"w": 10_000}}[rank]
    slow = replace(H100, hbm=1e6, nvlink=1e5), Network("slow", 1e4)
    report = reshard_report(three, *slow, staging_bytes=4 * (8000 + 3 * 8))
    assert report["covered_once"] is True
    assert report["bytes"] == {"same GPU": 0, "same node": 12_000, "across nodes": 20_000}
    assert report["bytes_sent_max"] == 32_000
    assert report["bytes_received_max"] == 20_000
    busiest = {"kind": "across nodes", "rank": 0, "direction": "sends", "bytes": 20_000, "seconds": 2.0}
    assert report["busiest_link"] == busiest
    assert report["seconds_at_least"] == 2.0
    # Rounds of 4000 elements: three to rank 2, the last of them half empty, then 4000 and 2000 to rank 1.
    assert report["rounds"] == 5
    assert report["seconds_predicted"] == pytest.approx(0.8 + 0.8 + 0.4 + 0.08 + 0.04)
    assert report["staging_bytes_max"] == 2 * 8000
    assert any("every byte arrives once" in line for line in describe(report))


def test_what_stays_on_its_gpu_takes_memory_bandwidth():
    whole = [Piece("t", (0,), (1000,), "w", (0,))]
    report = reshard_report(job([whole], [whole], [0], 1000), replace(H100, hbm=1e3, nvlink=1.0), Network("slow", 1.0))
    assert report["bytes"] == {"same GPU": 2000, "same node": 0, "across nodes": 0}
    assert report["seconds_predicted"] == report["seconds_at_least"] == 4.0  # read and written
    assert report["rounds"] == report["bytes_received_max"] == report["staging_bytes_max"] == 0


def test_a_gap_in_the_plan_shows():
    whole = [Piece("t", (0,), (1000,), "w", (0,))]
    report = reshard_report(job([whole], [whole], [0], 1001), H100, IB400)
    assert report["covered_once"] is False
    assert any("NOT every byte" in line for line in describe(report))


def test_ranks_are_told_apart():
    plan = [move(0, 1, 1), move(0, 2, 1)]
    assert np.array_equal(traffic(plan, [0, 0, 0, 0], 2)[1], [[40, 0, 0, 0], [0, 20, 20, 0]])
