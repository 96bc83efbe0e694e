"""The collector on vLLM: a cache of a quarter of the demand, two engines on one queue, ranks that disagree."""

from __future__ import annotations

import fcntl
import math

import pytest
from harness import LaunchError, launch
from models import write_prompts

from treepo_mcore.engine.vllm.cpu import SHARED, remove_leftovers
from treepo_mcore.tree.files import read_trees

WIDTH = 8


def configuration(directory, folder, **rollout):
    prompts = write_prompts(folder / "prompts.jsonl", 12, tokens=40)
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(directory)},
        "data": {"train": str(prompts), "max_prompt_tokens": 64},
        "rollout": {
            "dtype": "float32",
            "tree": {"width": WIDTH, "segment_tokens": 16, "max_depth": 6, "stopping": {"repetition_count": 0}},
        }
        | rollout,
        "filter": {"enabled": False},
        "actor": {"dtype": "float32", "micro_batch_tokens": 1024},
        "reward": {"function": "reward_functions:last_word_is_even"},
        "trainer": {"prompts_per_step": 12, "prompts_per_update": 12},
    }


def collect(model_directory, folder, processes=1, run=None, **rollout):
    config = configuration(model_directory("qwen3"), folder, **rollout)
    config["run"] |= run or {}
    ranks = launch("rollout:collect", processes, {"config": config, "out": str(folder / "trees.jsonl")})
    return ranks, list(read_trees(folder / "trees.jsonl"))


def whole(trees):
    assert [tree.meta["number"] for tree in trees] == list(range(12))
    for tree in trees:
        assert len(tree.leaves) == WIDTH
        assert all(leaf.reward is not None for leaf in tree.leaves)


def test_a_quarter_of_the_cache(model_directory, tmp_path):
    """Also the test that fails when the names inside vLLM's scheduler change."""
    (ample,), trees = collect(model_directory, tmp_path, engine={"num_gpu_blocks_override": 600})
    whole(trees)
    assert ample["block_tokens"] == 32
    assert ample["free"] == ample["free_after"] == 599  # one block is vLLM's own
    assert ample["counts"]["preemptions"] == 0
    demand = ample["free"] - ample["lowest"]
    assert demand > 40
    (small,), trees = collect(model_directory, tmp_path, engine={"num_gpu_blocks_override": demand // 4 + 1})
    whole(trees)
    assert small["free"] == small["free_after"] == demand // 4
    print("demand", demand, "steps", ample["counts"]["steps"], small["counts"]["steps"], small["counts"]["preemptions"])
    assert small["counts"]["steps"] > ample["counts"]["steps"]
    # A cache for hardly more than one path: admission cannot help, requests do lose their blocks.
    (tiny,), trees = collect(model_directory, tmp_path, engine={"num_gpu_blocks_override": 12})
    whole(trees)
    assert tiny["counts"]["preemptions"] > 0


def test_a_context_taken_in_by_parts_changes_no_draw(model_directory, tmp_path):
    """On a CPU vLLM would end the run: it cannot turn back the generator of a request whose context is not all in."""
    _, whole_contexts = collect(model_directory, tmp_path, run={"deterministic": True})
    parts = {"max_num_batched_tokens": 100, "max_num_seqs": 100}
    (counted,), trees = collect(model_directory, tmp_path, run={"deterministic": True}, engine=parts)
    whole(trees)
    assert counted["counts"]["context_tokens"] > 12 * 40
    responses = [[tree.response(leaf) for leaf in range(WIDTH)] for tree in trees]
    expected = [[tree.response(leaf) for leaf in range(WIDTH)] for tree in whole_contexts]
    # Other batches round otherwise, and a number that falls on the edge of a token may fall on its neighbour's side.
    assert sum(mine == theirs for mine, theirs in zip(responses, expected, strict=True)) >= 10


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_engines_take_prompts_from_one_queue(model_directory, tmp_path, deterministic):
    ranks, trees = collect(model_directory, tmp_path, 2, run={"deterministic": deterministic})
    whole(trees)
    assert ranks[0]["counts"] == ranks[1]["counts"]  # summed over engines
    assert ranks[0]["counts"]["drawn_prompts"] == 12


@pytest.mark.long
def test_two_engines_repeat_a_run_token_for_token(model_directory, tmp_path):
    """With the filter, rewards whenever they come, and a tail that is cut; pairs of leaves agree half the time."""
    runs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        config = configuration(model_directory("qwen3"), tmp_path / name, tail_steps=40)
        config["rollout"]["tree"] |= {"width": 2, "branching": {"factor": 2}}
        config["rollout"]["engine"] = {"max_num_seqs": 4}
        config |= {"filter": {"max_prompts_factor": 2.0}, "trainer": {"prompts_per_step": 6, "prompts_per_update": 6}}
        config["run"]["deterministic"] = True
        config["reward"]["function"] = "reward_functions:last_word_is_even_in_a_while"
        out = tmp_path / name / "trees.jsonl"
        (first, second) = launch("rollout:collect", 2, {"config": config, "out": str(out)})
        timed = {"idle_seconds"}
        counts = {key: value for key, value in first["counts"].items() if key not in timed}
        assert counts == {key: value for key, value in second["counts"].items() if key not in timed}
        runs.append((out.read_text(), counts))
    assert runs[0] == runs[1]
    assert runs[0][1]["drawn_prompts"] > 6  # some were replaced
    assert runs[0][1]["unfinished_prompts"] > 0


@pytest.mark.parametrize(
    ("tp", "deterministic", "ends"), [(1, True, {"tail_steps": 8}), (2, False, {"over_provision": 1.5})]
)
def test_what_is_unfinished_goes_on_in_the_next_step(model_directory, tmp_path, tp, deterministic, ends):
    """On its engine, from its tokens; and these are still the ones that the actor gives their log-probs to."""
    settings = {"tp": tp, "unfinished": "resume", "engine": {"max_num_seqs": 4}}
    config = configuration(model_directory("qwen3"), tmp_path, **settings, **ends)
    config["run"]["deterministic"] = deterministic
    config["data"]["shuffle"] = False
    config["trainer"] = {"prompts_per_step": 4, "prompts_per_update": 4}
    ranks = launch("rollout:resumes", 2, {"config": config})
    for first, second in ranks:
        put_off = first["counts"]["unfinished_prompts"]
        assert put_off > 0
        assert first["counts"]["discarded_tokens"] == 0
        assert second["counts"]["resumed_prompts"] == put_off
        assert second["counts"]["resumed_tokens"] > 0
        done = first["prompts"] | second["prompts"]
        assert len(done) == len(first["prompts"]) + len(second["prompts"])
        assert len(first["prompts"]) == 4 - put_off if "tail_steps" in ends else len(first["prompts"]) >= 4
        # What was put off came before all others.
        assert {f"prompts-{index}" for index in range(4)} <= done.keys()
        assert all(rewarded for _, rewarded in done.values())
        assert max(first["gap"], second["gap"]) < 1e-5


def test_all_ranks_of_an_engine_hear_which_prompts_go_on(model_directory, tmp_path):
    tree = configuration(model_directory("qwen3"), tmp_path)["rollout"]["tree"]
    tree |= {"early_stop": {"leaves": 2, "min_chance": 1.0}, "fallback": {"candidates": "none"}}
    ranks, trees = collect(model_directory, tmp_path, 2, tp=2, tree=tree)
    stopped = [tree for tree in trees if tree.meta["first_answers"][0] in (0, 2)]
    assert ranks[0]["counts"]["stopped_prompts"] == len(stopped)
    assert {len(tree.leaves) for tree in stopped} == {2}
    assert 0 < len(stopped) < len(trees) == 12
    assert max(len(tree.leaves) for tree in trees) == WIDTH


def test_a_run_trains_on_what_starts_behind_remembered_answers(model_directory, tmp_path):
    """Six prompts, seen in every step; half of all answers are right, and two that agree are common."""
    config = configuration(model_directory("qwen3"), tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", 6, tokens=40)
    tree = {"early_stop": {"leaves": 2, "min_chance": 0.0}, "contrast": {"paths": 4}}
    config["rollout"]["tree"] |= tree | {"width": 4, "branching": {"factor": 1, "first": 4}}
    config["advantage"] = {"estimator": "rloo"}
    form = {"function": "format", "weight": 0.5, "options": {"pattern": ".*"}}
    config["reward"]["components"] = {"form": form}
    config["trainer"] = {"steps": 8, "prompts_per_step": 6, "prompts_per_update": 6, "export": False}
    config["trainer"] |= {"save_trees_every": 1, "eval_every": 0}
    (rows,) = launch("rollout:restarts", 1, {"config": config})
    assert len(rows) == 8
    assert rows[0]["rollout/restarted_prompts"] == 0
    assert sum(row["rollout/restarted_prompts"] for row in rows) > 0
    assert rows[-1]["remembered"] > 0
    assert all(math.isfinite(row["actor/loss"]) for row in rows)
    assert all(row["reward/form/mean"] == 1 for row in rows)
    assert all(row["reward/mean"] == pytest.approx(row["reward/accuracy"] + 0.5) for row in rows)
    files = sorted((tmp_path / "run" / "trees").glob("restarts_*"))
    grown = [tree for file in files for tree in read_trees(file)]
    assert len(grown) == sum(row["rollout/restarted_prompts"] for row in rows)
    for tree in grown:
        assert tree.replayed > 0
        assert len(tree.leaves) == 4
        assert len(tree.nodes[0].tokens) > 40 // 2


def test_an_engine_that_schedules_nothing_is_an_error(model_directory, tmp_path):
    """Also the test that fails when the names inside vLLM's scheduler change."""
    config = configuration(model_directory("qwen3"), tmp_path)
    (said,) = launch("rollout:stuck", 1, {"config": config}, limit=100)
    assert said.startswith("vLLM has scheduled nothing in 101 steps: ")


def test_what_a_killed_job_left_in_shared_memory_is_removed_and_nothing_else(model_directory, tmp_path):
    """The next job calls `remove_leftovers` when it starts; here it is called alone, beside a job that lives."""
    config = configuration(model_directory("qwen3"), tmp_path, tp=2)
    for _ in range(5):  # where a job of another test starts at that moment, it may remove it first
        with pytest.raises(LaunchError):
            launch("rollout:killed", 2, {"config": config}, limit=100)
        if dead := next(filter(None, map(locked, SHARED.glob("treepo_mcore-*.job"))), None):
            break
    job, lock = dead
    # Where vLLM's kernels are built without AVX-512, it has no segment of its own.
    name = job.stem.removeprefix("treepo_mcore-")
    (SHARED / f"cpushm-{name}").touch()
    left = set(SHARED.glob(f"*{name}*"))
    assert len(left) >= 2
    lock.close()
    lives = SHARED / "treepo_mcore-lives.job"
    with lives.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        remove_leftovers()
        assert not {path for path in left if path.exists()}
        assert lives.exists()
    remove_leftovers()
    assert not lives.exists()


def locked(job):
    """The file of a dead job, and a lock on it that keeps others from removing it; None where the job lives."""
    try:
        lock = job.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return job, lock


@pytest.mark.parametrize("kind", ["seed", "length"])
def test_a_rank_that_goes_another_way_is_an_error_on_all(model_directory, tmp_path, kind):
    config = configuration(model_directory("qwen3"), tmp_path, tp=2)
    errors = launch("rollout:diverge", 2, {"config": config, "kind": kind}, limit=200)
    assert any("sampled different tokens" in error for error in errors)
    assert all("of this engine" in error for error in errors)
