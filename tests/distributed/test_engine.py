"""What vLLM does after a push is what `transformers` does with the same weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from answers import TOKENS, check_answers
from harness import launch
from models import EOS_IDS, YARN, Reference, write_prompts
from trees import path_of, random_tree

from treepo_mcore.tree.files import read_trees, write_trees
from treepo_mcore.tree.tree import EOS, FINISHED

TEMPERATURE = 0.7
ROUNDS = 3
TOLERANCE = 1e-4  # nats
CASES = {
    "one process, rollout tp1": (1, {"family": "qwen2", "rope_parameters": YARN}, {}, 1),
    "tp2, rollout tp2": (2, {"family": "qwen3", "tie_word_embeddings": True}, {"tp": 2}, 2),
    "pp2, two engines": (2, {"family": "qwen2", "tie_word_embeddings": True}, {"pp": 2}, 1),
    "tp2, fused files, two engines": (2, {"family": "phi3"}, {"tp": 2}, 1),
    "dp2, rollout tp2, one kv head": (2, {"family": "llama", "num_key_value_heads": 1}, {}, 2),
}


def configuration(directory, folder, actor, rollout_tp):
    prompts = write_prompts(folder / "prompts.jsonl", 6, tokens=40)
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(directory)},
        "data": {"train": str(prompts), "eval": str(prompts), "overlap": "keep", "max_prompt_tokens": 64},
        "rollout": {
            "tp": rollout_tp,
            "dtype": "float32",
            "temperature": TEMPERATURE,
            "tree": {"width": 8, "segment_tokens": 16, "max_depth": 4, "stopping": {"repetition_count": 0}},
        },
        "filter": {"enabled": False},
        "actor": {"dtype": "float32", "micro_batch_tokens": 1024, "optimizer": {"lr": 1e-2}} | actor,
        "reward": {"function": "reward_functions:last_word_is_even"},
        "trainer": {"prompts_per_step": 6, "prompts_per_update": 6},
    }


@pytest.fixture(scope="module", params=CASES)
def job(request, model_directory, tmp_path_factory):
    """One launch, looked at by all tests below: (results of the ranks, folder)."""
    processes, model, actor, rollout_tp = CASES[request.param]
    folder = tmp_path_factory.mktemp("engine")
    write_trees(folder / "random.jsonl", [random_tree(seed) for seed in range(2 * ROUNDS)])
    overrides = {key: value for key, value in model.items() if key != "family"}
    arguments = {
        "config": configuration(model_directory(model["family"], **overrides), folder, actor, rollout_tp),
        "trees": str(folder / "random.jsonl"),
        "rounds": ROUNDS,
        "tokens": TOKENS,
        "out": str(folder),
    }
    return launch("engine:run", processes, arguments), folder


@pytest.fixture(scope="module")
def prompts(job):
    trees = list(read_trees(job[1] / "trees.jsonl"))
    return [tree.context(0) for tree in sorted(trees, key=lambda tree: tree.prompt_id)]


def test_greedy_answers_after_every_push(job, prompts):
    telling = check_answers(*job, prompts, ROUNDS + 1)
    assert telling >= 2 * (ROUNDS + 1), "too few answers are long and varied enough to tell weights apart"


def test_the_ranks_know_that_they_are_on_one_node(job):
    """vLLM's CPU platform changes what the launcher said."""
    assert all(rank["one node"] for rank in job[0])


def test_every_step_changed_the_answers(job):
    answers = job[0][0]["answers"]
    assert all(a != b for before, after in itertools.pairwise(answers) for a, b in zip(before, after, strict=True))


def test_every_eos_id_ends_an_answer(job):
    for result in job[0]:
        ends = {*result["stopped"]["ends"], *EOS_IDS}
        for whole, found in zip(result["answers"][-1], result["stopped"]["answers"], strict=True):
            cut = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
            assert found == whole[:cut]


def test_behaviour_log_probs(job):
    """Of the tempered distribution: equal to the actor's and to those of `transformers`."""
    ranks, folder = job
    assert max(result["gap"] for result in ranks) < TOLERANCE
    reference = Reference(folder / f"round_{ROUNDS}")
    worst = 0.0
    for tree in read_trees(folder / "trees.jsonl"):
        first = len(tree.nodes[0].tokens)
        for leaf in range(len(tree.leaves)):
            logp = reference.log_probs(path_of(tree, leaf), TEMPERATURE)[0][first - 1 :]
            worst = max(worst, (logp - torch.tensor(tree.response_logprobs(leaf))).abs().max().item())
    print("largest error of behaviour log-probs:", worst, "to the actor's:", max(r["gap"] for r in ranks))
    assert worst < TOLERANCE


def test_trees_are_full_and_end_as_they_say(job):
    for tree in read_trees(job[1] / "trees.jsonl"):
        assert len(tree.leaves) == 8
        for index, leaf in enumerate(tree.leaves):
            response = tree.response(index)
            assert (response[-1] in EOS_IDS) == (leaf.reason in (EOS, FINISHED))
            assert not set(response[:-1]) & set(EOS_IDS)
            assert leaf.reward is not None


def test_siblings_hit_the_prefix_cache(job):
    """The prompt has 40 tokens and a block 32, so every request but a prompt's first finds one block or more."""
    counts = job[0][0]["counts"]
    siblings = counts["requests"] - 6
    assert siblings >= 6
    assert counts["cached_tokens"] >= 32 * siblings * 0.8
    assert counts["cached_tokens"] < counts["context_tokens"]
