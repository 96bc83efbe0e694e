"""What ranks tell each other: trees to who trains on them, outlines to all; time limits; one asks and reads for all."""

import pytest
from harness import launch

SECONDS = 2.0


@pytest.fixture(scope="module")
def ranks(model_directory, tmp_path_factory):
    """Two engines of two ranks; for the hub two nodes of two."""
    cache = tmp_path_factory.mktemp("hub")
    arguments = {"prompts": 6, "seconds": SECONDS, "cache": str(cache), "directory": str(model_directory("qwen3"))}
    return launch("exchange:everything", 4, arguments)


def test_trees_go_to_those_that_train_on_them(ranks):
    found = [rank["deliver"] for rank in ranks]
    for rank in found:
        assert rank["numbers"] == list(range(6))
        assert rank["drawn"] == []
        assert rank["same"] == [True] * len(rank["same"])
        assert rank["none"] == 0
    assert [len(rank["same"]) for rank in found] == [3, 4, 3, 4]
    assert len({rank["outlines"] for rank in found}) == 1


def test_no_group_waits_longer_than_it_is_told(ranks):
    """Also the test that fails when the names inside torch.distributed change."""
    assert 0.9 * SECONDS < ranks[0]["waited"] < 1.9 * SECONDS


@pytest.mark.parametrize(("disks", "askers"), [("shared", [0]), ("own", [0, 2])])
def test_one_process_asks_the_hub(ranks, disks, askers):
    asked = [rank["hub"][disks] for rank in ranks]
    assert asked == [[f"rank {rank}: org/model"] if rank in askers else [] for rank in range(4)]


def test_one_replica_reads_the_weights_for_all(ranks):
    found = [rank["replicas"] for rank in ranks]
    assert [rank["read"] for rank in found] == [1, 0, 0, 0]
    assert all(rank["sums"] == found[0]["sums"] for rank in found)
    assert any(found[0]["sums"].values())


def test_what_is_wrong_on_one_rank_is_said_on_all(ranks):
    for rank in ranks:
        assert rank["refusals"] == [
            "b.jsonl: rank 1 found prompts of hash hash1, rank 0 of hash hash0",
            "policy: cannot be written by rank 1: Permission denied",
        ]
