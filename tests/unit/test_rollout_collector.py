"""The collector on a fake engine: admission, the streaming filter, the tail, failures, calls of a token."""

import logging
import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import torch.distributed as dist
from rollout_fake_engine import (
    EOS_TOKEN,
    FakeEngine,
    FakeRewards,
    FakeTokenizer,
    hazard_draw,
    make_config,
    make_prompts,
)

from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.grow.contrast import RarePaths
from treepo_mcore.grow.sampler import stable_seed
from treepo_mcore.rewards.math import final_answer
from treepo_mcore.rollout import queue as queue_module
from treepo_mcore.rollout.collection import Collection
from treepo_mcore.rollout.collector import Collector
from treepo_mcore.rollout.queue import LockstepQueue, SharedQueue, Wanted
from treepo_mcore.tree.stats import informative


def collect(engine, prompts, config=None, rewards=None, wanted=None, step=0, queue=None, rare=None) -> Collection:
    config = config or make_config({})
    wanted = wanted or len(prompts)
    if queue is None:
        deterministic = config.run.deterministic
        queue = (
            LockstepQueue(None, 0, 1, Wanted(wanted, wanted, len(prompts)))
            if deterministic
            else SharedQueue(dist.HashStore(), 0, 1, Wanted(wanted, wanted, len(prompts)))
        )
    return Collector(config, engine, FakeTokenizer(), rewards, None).collect(prompts, queue, step, 0.0, rare=rare)


def whole(result: Collection, width: int = 8) -> None:
    for tree in result.trees:
        assert len(tree.leaves) == width
        assert tree.masses().sum() == pytest.approx(1.0)


def tables(result: Collection) -> list:
    rows = [tree.to_json() for tree in result.trees]
    for row in rows:
        row["meta"] = row["meta"]["number"]
    return rows


# Admission by free blocks.


def peak_blocks(engine, prompts) -> int:
    seen = []
    step = engine.step

    def watched():
        chunks = step()
        seen.append(engine.held)
        return chunks

    engine.step = watched
    whole(collect(engine, prompts))
    return max(seen)


@pytest.mark.parametrize("expansion", ["fork_behind", "stop_and_fork"])
def test_a_quarter_of_the_cache_loses_nothing(expansion):
    prompts = make_prompts(40)
    demand = peak_blocks(FakeEngine(hazard_draw(0.05)), prompts)
    small = FakeEngine(hazard_draw(0.05), blocks=demand // 4)
    config = make_config({"tree": {"expansion": expansion}})
    result = collect(small, prompts, config)
    whole(result)
    assert len(result.trees) == 40
    assert small.held == 0
    ample = collect(FakeEngine(hazard_draw(0.05)), prompts, config)
    assert tables(result) == tables(ample)  # trees do not depend on who ran when


def test_one_path_at_a_time_still_ends():
    blocks = (5 + 20) // 4 + 2  # the longest path and hardly more
    engine = FakeEngine(hazard_draw(0.02), blocks=blocks)
    result = collect(engine, make_prompts(3))
    whole(result)
    assert len(result.trees) == 3
    assert result.counts.preemptions == engine.lost > 0


def test_admission_waits_for_blocks_and_for_places():
    prompts = make_prompts(30)
    for limit in ({"blocks": 200}, {"max_requests": 20}):
        engine = FakeEngine(hazard_draw(0.05), **limit)
        result = collect(engine, prompts)
        whole(result)
        assert engine.lost < len(engine.submitted) / 4
        assert result.counts.live_sum / result.counts.steps > 10  # and does not starve either
    assert engine.peak == 20


# The streaming filter.


def hard_and_easy(prompt: str) -> bool:
    """Whether a prompt is informative: two of three are not."""
    return int(prompt.split()[1]) % 3 == 0


def verdict(text: str, prompt: str) -> bool:
    return hard_and_easy(prompt) and stable_seed(text) % 2 == 0


@pytest.mark.parametrize("delay", [0, 7])
@pytest.mark.parametrize("deterministic", [False, True])
def test_uniform_prompts_are_replaced_and_nothing_more_is_drawn(delay, deterministic):
    config = make_config({}, run={"deterministic": deterministic})
    prompts = make_prompts(200)
    result = collect(FakeEngine(hazard_draw(0.05)), prompts, config, FakeRewards(verdict, delay), wanted=10)
    kept = [tree.meta["number"] for tree in result.trees if informative(tree)]
    assert len(kept) == 10
    assert result.counts.drawn_prompts == len(result.trees) == kept[-1] + 1  # the shortest run that holds ten
    assert all(leaf.reward is not None for tree in result.trees for leaf in tree.leaves)


def fails_now_and_then(text: str, prompt: str) -> float:
    """A checker that hangs on one answer in three, and has one verdict for all the others of most prompts."""
    return math.nan if stable_seed(text) % 3 == 0 else verdict(text, prompt)


@pytest.mark.parametrize(("failed", "worth"), [("wrong", -1.0), (-5, -5.0), (0.25, 0.25)])
def test_a_call_that_fails_never_pays_and_makes_no_prompt_informative(failed, worth):
    config = make_config({}, reward={"function": "m:f", "failed": failed})
    result = collect(FakeEngine(hazard_draw(0.05)), make_prompts(60), config, FakeRewards(fails_now_and_then))
    leaves = [leaf for tree in result.trees for leaf in tree.leaves]
    lost = [leaf for leaf in leaves if leaf.failed]
    assert len(lost) == result.counts.failed_rewards > 50
    assert len(leaves) == result.counts.rewards
    assert {(leaf.score, leaf.reward, leaf.correct) for leaf in lost} == {(worth, worth, False)}
    assert all(hard_and_easy(tree.meta["prompt"]) for tree in result.trees if informative(tree))


def test_dropped_leaves_leave_their_trees_and_a_prompt_without_any_is_replaced():
    def score(text: str, prompt: str) -> float:
        return math.nan if prompt == "prompt 3" else fails_now_and_then(text, prompt)

    config = make_config({}, reward={"function": "m:f", "failed": "drop"}, filter={"enabled": False})
    prompts = make_prompts(40)
    result = collect(FakeEngine(hazard_draw(0.05)), prompts, config, FakeRewards(score), wanted=20)
    assert len(result.trees) == 20
    assert "p3" not in {tree.prompt_id for tree in result.trees}
    assert result.counts.failed_prompts == 1
    assert not [leaf for tree in result.trees for leaf in tree.leaves if leaf.failed]
    assert sum(len(tree.leaves) for tree in result.trees) < 8 * 20
    assert all(tree.masses().sum() == pytest.approx(1.0) for tree in result.trees)


def test_the_filter_looks_at_scores_before_the_penalty():
    """All answers count as correct, and all trees have leaves of several lengths."""

    def score(text: str, prompt: str) -> float:
        return (0.2, 0.5, 0.9)[stable_seed(text) % 3] if hard_and_easy(prompt) else 0.5

    reward = {"function": "m:f", "overlong_buffer_tokens": 16, "overlong_penalty": 0.5}
    result = collect(
        FakeEngine(hazard_draw(0.05)),
        make_prompts(200),
        make_config({}, reward=reward),
        FakeRewards(score),
        wanted=10,
    )
    kept = [tree for tree in result.trees if informative(tree)]
    assert [tree.meta["number"] for tree in kept] == [3 * n for n in range(10)]
    assert len(result.trees) == 28
    for tree in result.trees:
        assert all(leaf.correct for leaf in tree.leaves)
        penalties = [max(0, tree.leaf_tokens(leaf) - 4) / 16 * 0.5 for leaf in range(8)]
        assert [leaf.score - leaf.reward for leaf in tree.leaves] == pytest.approx(penalties)
        assert len({leaf.reward for leaf in tree.leaves}) > 1


FLAT = {"sampler": "flat"}


def early(rollout, leaves=3, min_chance=1.0, **sections):
    return make_config(rollout | {"tree": {"early_stop": {"leaves": leaves, "min_chance": min_chance}}}, **sections)


@pytest.mark.parametrize("delay", [0, 7])
@pytest.mark.parametrize("deterministic", [False, True])
def test_prompts_whose_first_answers_agree_give_their_budget_back(delay, deterministic):
    run = {"deterministic": deterministic}
    prompts = make_prompts(60)
    config, plain = early(FLAT, run=run), make_config(FLAT, run=run)
    whole_trees = collect(FakeEngine(hazard_draw(0.05)), prompts, plain, FakeRewards(verdict, delay))
    result = collect(FakeEngine(hazard_draw(0.05)), prompts, config, FakeRewards(verdict, delay))
    assert len(result.trees) == 60
    stopped = 0
    for tree, other in zip(result.trees, whole_trees.trees, strict=True):
        first = [tree.response(leaf) for leaf in range(3)]
        right = sum(bool(leaf.correct) for leaf in tree.leaves[:3])
        assert tree.meta["first_answers"] == [right, 3]
        if 0 < right < 3:  # the very tree of a run that does not look
            assert [leaf.text for leaf in tree.leaves] == [leaf.text for leaf in other.leaves]
        else:
            stopped += 1
            assert [other.response(leaf) for leaf in range(3)] == first
            assert len(tree.leaves) == 3
    assert stopped == result.counts.stopped_prompts > 40
    assert result.counts.decoded_tokens < 0.7 * whole_trees.counts.decoded_tokens


def test_what_may_still_differ_goes_on():
    """Before anything was seen a third answer like the first two is likely, six more like them are not."""
    config = early(FLAT, leaves=2, min_chance=1 - 3 / 9 - 1e-9)
    result = collect(FakeEngine(hazard_draw(0.05)), make_prompts(40), config, FakeRewards(verdict))
    whole(result)
    assert result.counts.stopped_prompts == 0
    config = early(FLAT, leaves=2, min_chance=1 - 3 / 9 + 1e-9)
    result = collect(FakeEngine(hazard_draw(0.05)), make_prompts(40), config, FakeRewards(verdict))
    assert result.counts.stopped_prompts > 0


def remembered(config, *rows: tuple[str, bool, list[int]]) -> RarePaths:
    rare = RarePaths(config.rollout.tree.contrast)
    rare.load_state_dict({"paths": [list(row) for row in rows]})
    return rare


@pytest.mark.parametrize("deterministic", [False, True])
def test_where_answers_agree_others_start_behind_a_remembered_one(deterministic):
    """All answers to p1 are wrong. One that was right is known of it, and a wrong one of p2; p0 differs by itself."""
    config = make_config(
        FLAT | {"tree": {"early_stop": {"leaves": 3, "min_chance": 1.0}, "contrast": {"paths": 4, "cut": 0.5}}},
        run={"deterministic": deterministic},
        reward={"function": "m:f", "overlong_buffer_tokens": 16, "overlong_penalty": 0.5},
    )
    rare = remembered(config, ("p1", True, [31, 32, 33, 34, 35]), ("p2", False, [41, 42]))
    heard = []

    def score(text: str, prompt: str) -> bool:
        heard.append((prompt, text))
        return verdict(text, prompt) or (text.startswith("31 32") and stable_seed(text) % 2 == 0)

    engine = FakeEngine(hazard_draw(0.05))
    result = collect(engine, make_prompts(3), config, FakeRewards(score), rare=rare)
    assert [tree.prompt_id for tree in result.trees] == ["p0", "p1", "p2"]
    assert [len(tree.leaves) for tree in result.trees][1:] == [3, 3]
    (tree,) = result.restarts
    assert (tree.prompt_id, tree.meta["replayed"], len(tree.leaves)) == ("p1", 2, 4)
    assert list(tree.nodes[0].tokens) == [7] * 5 + [31, 32]
    assert not tree.nodes[0].trained
    assert result.counts.restarted_prompts == 1
    assert sum(text.startswith("31 32 ") for prompt, text in heard if prompt == "prompt 1") == 4
    assert all(2 + tree.leaf_tokens(leaf) <= 20 for leaf in range(4))
    lengths = [2 + tree.leaf_tokens(leaf) for leaf in range(4)]
    penalties = [max(0, length - 4) / 16 * 0.5 for length in lengths]
    assert [leaf.score - leaf.reward for leaf in tree.leaves] == pytest.approx(penalties)
    assert len({request.id for request in engine.submitted}) == len(engine.submitted)


def test_an_informative_restart_is_reported_in_its_trees_place():
    """Ten are wanted; p1 to p4 agree by themselves and become informative behind what is known of them."""
    config = make_config(
        FLAT | {"tree": {"early_stop": {"leaves": 3, "min_chance": 1.0}, "contrast": {"paths": 8}}},
        filter={"max_prompts_factor": 10.0},
    )
    rare = remembered(config, *((f"p{n}", True, [31, 32]) for n in (1, 2, 4, 5)))

    def score(text: str, prompt: str) -> bool:
        return stable_seed(text) % 2 == 0 and (text.startswith("31 ") or hard_and_easy(prompt))

    result = collect(FakeEngine(hazard_draw(0.05)), make_prompts(100), config, FakeRewards(score), wanted=10, rare=rare)
    kept = [tree for tree in [*result.trees, *result.restarts] if informative(tree)]
    assert len(kept) == 10
    assert len([tree for tree in result.restarts if informative(tree)]) >= 3
    assert result.counts.drawn_prompts == len(result.trees)


def test_a_cut_tail_gives_up_what_is_not_decided():
    config = early(FLAT | {"tail_steps": 5, "unfinished": "drop"})
    rewards = FakeRewards(verdict, delay=10**9)
    result = collect(FakeEngine(hazard_draw(0.3)), make_prompts(20), config, rewards)
    assert not result.trees
    assert result.counts.unfinished_prompts == 20


def test_the_limit_holds_when_nothing_is_informative():
    result = collect(
        FakeEngine(hazard_draw(0.05)), make_prompts(30), rewards=FakeRewards(lambda text, prompt: False), wanted=10
    )
    assert len(result.trees) == 30


def length_draw(prompt_numbers_short):
    def draw(request, position):
        number = int(request.id.split(":")[0])
        return EOS_TOKEN if number in prompt_numbers_short and position >= 1 else 5 + position % 7

    return draw


def test_the_accepted_set_is_not_biased_towards_fast_prompts():
    # Half the prompts end after 2 tokens, the others after 20. An engine with few places that accepted whatever is
    # ready first would take nearly only short ones.
    rng = random.Random(0)
    share = []
    for trial in range(20):
        short = {number for number in range(200) if rng.random() < 0.5}
        lucky = {number for number in range(200) if rng.random() < 0.4}
        rewards = FakeRewards(
            lambda text, prompt, lucky=lucky: int(prompt.split()[1]) in lucky and bool(rng.random() < 0.5), delay=3
        )
        engine = FakeEngine(length_draw(short), max_requests=24)
        result = collect(engine, make_prompts(200), rewards=rewards, wanted=24, step=trial)
        kept = [tree.meta["number"] for tree in result.trees if informative(tree)]
        assert len(kept) == 24
        assert [tree.meta["number"] for tree in result.trees] == list(range(kept[-1] + 1))  # nobody was passed over
        share.append(sum(number in short for number in kept) / len(kept))
    assert abs(np.mean(share) - 0.5) < 3 * np.std(share) / np.sqrt(len(share)) + 0.01


def test_a_run_repeats_token_for_token_under_deterministic():
    config = make_config({}, run={"deterministic": True})
    runs = [
        collect(
            FakeEngine(hazard_draw(0.05), blocks=400), make_prompts(100), config, FakeRewards(verdict, delay), wanted=12
        )
        for delay in (0, 1, 5)
    ]
    assert tables(runs[0]) == tables(runs[1]) == tables(runs[2])
    assert runs[0].counts.steps == runs[1].counts.steps == runs[2].counts.steps


# Text and counts.


def test_boxes_under_sentencepiece_are_those_that_the_reward_sees(tmp_path):
    """Pieces begin with a space, which SentencePiece leaves out of a text that such a piece begins."""
    lines = ["the answer is \\boxed {5} now", "so \\ boxed{7}", "\\boxed{12}"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 200),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    config = make_config({"tree": {"stopping": {"boxed": "boxed", "repetition_count": 0}}})
    stopper = Collector(config, FakeEngine(hazard_draw(0.1)), tokenizer, None, None).stopper
    for text in (*lines, "\\boxed{ 5 } so", "\\boxed {5}", "\\ boxed{5} \\boxed{", "so \\boxed{{}}"):
        found = stopper.watch([]).feed(tokenizer.encode(text)) is not None
        assert found == (final_answer(text) is not None), text


def test_tokens_without_text_are_told_once(caplog):
    engine = FakeEngine(lambda request, position: EOS_TOKEN if position else FakeTokenizer.vocab_size)
    with caplog.at_level(logging.WARNING):
        result = collect(engine, make_prompts(3), rewards=FakeRewards(verdict))
    whole(result)
    assert [record.message for record in caplog.records] == [
        "the model answered with token 1000, its tokenizer has 1000: such tokens have no text"
    ]


def test_recomputed_tokens_are_those_computed_twice():
    """Prompts of 9 tokens, of which the cache has 8 from an earlier phase; a tree of one path has nothing twice."""
    for width, recomputed in ((1, 0), (8, 7)):  # each sibling computes one token again
        config = make_config({"tree": {"width": width, "branching": {"first": width}}})
        result = collect(FakeEngine(hazard_draw(0.0)), make_prompts(4, tokens=9), config)
        assert [tree.meta["recomputed_tokens"] for tree in result.trees] == [recomputed] * 4


# The tail.


def slow_last(request, position):
    number = int(request.id.split(":")[0])
    return EOS_TOKEN if number < 8 and position >= 1 else 5 + position % 7


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_tail_is_cut_and_what_was_unfinished_is_named(deterministic):
    config = make_config({"tail_steps": 12}, run={"deterministic": deterministic})
    result = collect(FakeEngine(slow_last), make_prompts(10), config)
    assert [tree.meta["number"] for tree in result.trees] == list(range(8))
    assert sorted(result.unfinished) == [8, 9]
    assert result.counts.unfinished_prompts == 2
    assert result.counts.discarded_tokens > 0
    assert result.counts.tail_steps == 13
    patient = collect(FakeEngine(slow_last), make_prompts(10))
    assert len(patient.trees) == 10
    assert patient.counts.tail_steps > 13


def test_verdicts_on_prompts_that_were_given_up_are_not_waited_for():
    """A judge may need half a minute for each; the next step throws them away."""
    rewards = FakeRewards(lambda text, prompt: stable_seed(text) % 2)

    def wait():
        raise AssertionError("waited for verdicts")

    rewards.drain = wait
    result = collect(FakeEngine(slow_last), make_prompts(10), make_config({"tail_steps": 12}), rewards)
    assert sorted(result.unfinished) == [8, 9]


def test_resumed_prompts_are_held_and_nobody_draws_them():
    store = dist.HashStore()
    queues = [SharedQueue(store, engine, 2, Wanted(4, 6, 12, 3, here)) for engine, here in enumerate((2, 1))]
    for queue in queues:
        queue._pause, queue._next = 0.0, 0.0
    one, other = queues
    assert [one.draw(), one.draw()] == [3, None]  # three of six each
    assert [other.draw(), other.draw(), other.draw()] == [4, 5, None]
    for queue in (one, one, other):
        queue.report(rejected=False)
    assert not one.enough()
    other.report(rejected=True)
    assert not other.enough()
    assert other.draw() == 6  # in the place of that
    other.report(rejected=False)
    assert one.enough()
    assert other.enough()
    assert not one.closed()
    one.give_up()
    one.report(rejected=True)  # what is put off
    other.report(rejected=True)
    assert one.closed()
    assert other.closed()


def test_no_tail_while_prompts_are_left_that_the_engine_may_not_draw_yet():
    """Another engine has room for none of its own prompts: this one holds its half, and takes the rest later."""
    queue = SharedQueue(dist.HashStore(), 0, 2, Wanted(8, 8, 8))
    result = collect(FakeEngine(hazard_draw(0.02)), make_prompts(8), make_config({"tail_steps": 20}), queue=queue)
    assert [tree.meta["number"] for tree in result.trees] == list(range(8))
    assert result.unfinished == []
    assert 0 < result.counts.tail_steps <= 20 < result.counts.steps


# Failures.


def test_an_engine_failure_loses_only_its_prompt():
    engine = FakeEngine(hazard_draw(0.02))
    original = engine.submit

    def submit(request):
        original(request)
        if request.id.startswith("3:") and len(engine.submitted) > 20:
            engine.fail.add(request.id)

    engine.submit = submit
    result = collect(engine, make_prompts(12), make_config({}, filter={"enabled": False}), wanted=10)
    whole(result)
    assert result.counts.failed_prompts == 1
    assert len(result.trees) == 10  # another one took its place
    assert 3 not in [tree.meta["number"] for tree in result.trees]
    assert engine.held == 0


# Two engines.


@pytest.fixture
def looks_always(monkeypatch):
    """What another engine did is seen at once."""
    monkeypatch.setattr(queue_module, "LOOKS_PER_SECOND", float("inf"))


class CountingStore:
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        self.store, self.asked = dist.HashStore(), 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.store, name)


def test_idle_engines_do_not_hammer_the_store(monkeypatch):
    """A thousand looks in a row within one pause are one request, and a new one shows what has changed meanwhile."""
    monkeypatch.setattr(queue_module, "LOOKS_PER_SECOND", 2 / 60)  # a minute for two engines
    store = CountingStore()
    idle, busy = (SharedQueue(store, engine, 2, Wanted(2, 2, 8)) for engine in range(2))
    assert [idle.draw(), busy.draw()] == [0, 1]
    idle.report(rejected=False)
    store.asked = 0
    for _ in range(1000):
        assert (idle.draw(), idle.closed(), idle.held_back()) == (None, False, False)
    assert store.asked <= 1
    busy.report(rejected=True)
    idle._next = 0.0  # the minute is over
    assert idle.draw() == 2


def test_engines_that_draw_at_once_share_the_numbers_out(looks_always):
    """Sixteen threads, each an engine: every number once, replacements included, and all see the end."""
    store, barrier = dist.HashStore(), threading.Barrier(16)

    def engine(index):
        queue, drawn = SharedQueue(store, index, 16, Wanted(200, 200, 230)), []
        barrier.wait()
        while not queue.closed():
            number = queue.draw()
            if number is not None:
                drawn.append(number)
                queue.report(rejected=number < 30)
        return drawn

    with ThreadPoolExecutor(16) as pool:
        everyone = list(pool.map(engine, range(16)))
    assert sorted(number for drawn in everyone for number in drawn) == list(range(230))


def test_two_engines_share_one_counter(looks_always):
    store = dist.HashStore()
    queues = [SharedQueue(store, engine, 2, Wanted(5, 5, 8)) for engine in range(2)]
    drawn = [queues[i % 2].draw() for i in range(5)]
    assert drawn == [0, 1, 2, 3, 4]
    assert queues[0].draw() is None
    queues[1].report(rejected=True)
    assert queues[1].draw() == 5
    for _ in range(3):
        queues[0].report(rejected=False)
    queues[1].report(rejected=False)
    assert not queues[0].closed()
    queues[1].report(rejected=False)
    assert queues[0].closed()
    assert queues[1].closed()


def test_no_engine_takes_more_than_its_share_at_a_time(looks_always):
    store = dist.HashStore()
    fast, slow = (SharedQueue(store, engine, 2, Wanted(5, 5, 8)) for engine in range(2))
    assert [fast.draw() for _ in range(4)] == [0, 1, 2, None]
    assert fast.held_back()
    assert [slow.draw() for _ in range(3)] == [3, 4, None]
    assert not fast.held_back()
    for _ in range(2):
        fast.report(rejected=True)
    assert [fast.draw(), slow.draw(), slow.draw()] == [5, 6, None]  # the queue is empty, or the share is held


def test_no_replacement_after_a_tail_was_cut(looks_always):
    store = dist.HashStore()
    queues = [SharedQueue(store, engine, 2, Wanted(2, 2, 8)) for engine in range(2)]
    assert [queue.draw() for queue in queues] == [0, 1]
    queues[0].give_up()
    queues[0].report(rejected=False)
    queues[1].report(rejected=True)
    assert queues[1].draw() is None
    assert queues[1].closed()


# What a token costs the host. Calls are counted, not seconds, so that a busy machine cannot fail it; seconds are in
# benchmarks/host_time.py.


@pytest.mark.parametrize("boxed", ["none", "boxed_and_eos", "boxed"])
def test_calls_of_a_token(boxed):
    """384 live requests with one token a step each, 16 steps: no look at all requests for one of them."""
    config = make_config(
        {"tree": {"width": 16, "segment_tokens": 512, "branching": {"first": 16}, "stopping": {"boxed": boxed}}}
    )
    engine = FakeEngine(lambda request, position: 5 + position % 97)
    original, steps, calls = engine.step, [], []

    def step():
        sys.setprofile(None)
        steps.append(len(engine.requests))
        if len(steps) == 50:
            raise KeyboardInterrupt
        chunks = original()
        if len(steps) >= 34:
            sys.setprofile(lambda frame, event, argument: calls.append(event) if event.endswith("call") else None)
        return chunks

    engine.step = step
    with pytest.raises(KeyboardInterrupt):
        collect(engine, make_prompts(24), config, FakeRewards(verdict))
    assert steps[1:] == [384] * 49
    assert len(calls) / (16 * 384) < 30  # 23 when this was written


def test_a_step_is_not_over_while_numbers_wait_to_be_drawn():
    """A small cache: the first tree is done, there was no room yet for the second."""
    queue = LockstepQueue(None, 0, 1, Wanted(2, 2, 2))
    assert queue.draw() == 0
    queue.report(rejected=False)
    queue.tick(finished=True)
    assert not queue.closed()
    assert queue.draw() == 1
    queue.tick(finished=True)
    assert queue.closed()
