"""A whole rollout phase, and an evaluation, around a fake engine."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
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

from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.grow.sampler import TreeSampler, stable_seed
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.grow.stopping import RuleStopper
from treepo_mcore.learn.filter import choose
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout import queue as queue_module
from treepo_mcore.rollout.collection import Collection
from treepo_mcore.rollout.collector import Collector
from treepo_mcore.rollout.evaluation import HeldOut, interval, majority
from treepo_mcore.rollout.phase import Rollout
from treepo_mcore.rollout.queue import LockstepQueue, Wanted
from treepo_mcore.system.placement import colocated
from treepo_mcore.tree.tree import Tree

PLACEMENT = colocated(rank=0, world=1, rollout_tp=1)


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def slow_last(request, position):
    """Prompts 8 and 9 of a step run to the longest length, the others end after two tokens."""
    return EOS_TOKEN if int(request.id.split(":")[0]) < 8 and position >= 1 else 5 + position % 7


def ten_prompts(unfinished, **sections):
    """A step of ten, whose tail is cut after twelve engine steps."""
    trainer = {"prompts_per_step": 10, "prompts_per_update": 10}
    rollout = {"tail_steps": 12, "unfinished": unfinished}
    return make_config(rollout, filter={"enabled": False}, trainer=trainer, **sections)


@pytest.mark.parametrize(
    ("unfinished", "expected"),
    [
        ("carry", ["p8", "p9", "p10", "p11"]),
        ("resume", ["p8", "p9", "p10", "p11"]),
        ("drop", ["p10", "p11", "p12", "p13"]),
    ],
)
def test_unfinished_prompts(unfinished, expected):
    config = ten_prompts(unfinished)
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    rollout = Rollout(config, PLACEMENT, FakeEngine(slow_last), FakeTokenizer(), None)
    batch = rollout.collect(stream, 0)
    trees, counts = batch.trees, batch.counts
    assert [tree.prompt_id for tree in trees] == [f"p{i}" for i in range(8)]
    assert counts.unfinished_prompts == 2
    assert (counts.discarded_tokens == 0) == (unfinished == "resume")
    assert [prompt.id for prompt in stream.peek(4)] == expected


def test_what_was_carried_is_not_given_up_again():
    """Engines hold all prompts at once: the tail begins with the step, and twelve steps are too few for slow ones."""
    slow = {"p8", "p9", "p11"}

    def draw(request, position):
        return EOS_TOKEN if request.id.split(":")[1].split("/")[0] not in slow and position >= 1 else 5 + position % 7

    config = ten_prompts("carry")
    stream = PromptStream(make_prompts(300), seed=0, shuffle=False)
    rollout = Rollout(config, PLACEMENT, FakeEngine(draw), FakeTokenizer(), None)
    seen = []
    for step in range(3):
        batch = rollout.collect(stream, step)
        trees, counts = batch.trees, batch.counts
        seen.append(([tree.prompt_id for tree in trees], counts.unfinished_prompts))
    assert seen == [
        ([f"p{i}" for i in range(8)], 2),
        (["p8", "p9", "p10", *(f"p{i}" for i in range(12, 18))], 1),
        (["p11", *(f"p{i}" for i in range(18, 27))], 0),
    ]


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_was_put_off_goes_on_from_its_tokens(deterministic):
    """With verdicts that come late: those on leaves that were there when the step ended are asked for again."""
    slow = {"p8", "p9", "p11"}

    def draw(request, position):
        length = len(request.context) + position - 5
        slowly = request.id.split(":")[1].split("/")[0] in slow
        return EOS_TOKEN if length >= (10 + request.seed % 8 if slowly else 2) else 5 + length % 7

    config = ten_prompts("resume", run={"deterministic": deterministic})
    stream = PromptStream(make_prompts(300), seed=0, shuffle=False)
    engine = FakeEngine(draw)
    rewards = FakeRewards(lambda text, prompt: stable_seed(text) % 2, delay=3)
    rollout = Rollout(config, PLACEMENT, engine, FakeTokenizer(), rewards)
    seen = []
    for step in range(3):
        begun = len(engine.submitted)
        batch = rollout.collect(stream, step)
        seen.append(([tree.prompt_id for tree in batch.trees], batch.counts.unfinished_prompts))
        assert batch.counts.resumed_prompts == (seen[step - 1][1] if step else 0)
        assert batch.counts.drawn_prompts == 10 - batch.counts.resumed_prompts
        assert batch.counts.discarded_tokens == 0
        assert all(leaf.reward is not None for tree in batch.trees for leaf in tree.leaves)
        assert [tree.meta["number"] for tree in batch.trees] == sorted(tree.meta["number"] for tree in batch.trees)
        longest = max(len(request.context) for request in engine.submitted[begun : begun + 8])
        assert longest > 5 + 8 if step else longest == 5
    assert seen == [
        ([f"p{i}" for i in range(8)], 2),
        (["p8", "p9", "p10", *(f"p{i}" for i in range(12, 18))], 1),
        (["p11", *(f"p{i}" for i in range(18, 27))], 0),
    ]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_more_prompts_than_are_wanted_are_under_way_and_slow_ones_take_their_steps(deterministic, filtered):
    """Every fifth prompt is slow; a step ends with ten accepted, no tree is lost, and none comes twice."""
    draw_fast, draw_slow = hazard_draw(0.4), hazard_draw(0.0)

    def draw(request, position):
        slow = int(request.id.split(":")[1].split("/")[0][1:]) % 5 == 0
        return (draw_slow if slow else draw_fast)(request, position)

    config = make_config(
        {"over_provision": 1.5, "unfinished": "resume", "agreement_every": 2, "tree": {"max_depth": 20}},
        run={"deterministic": deterministic},
        filter={"enabled": filtered, "max_prompts_factor": 3.0},
        trainer={"prompts_per_step": 10, "prompts_per_update": 10},
    )
    stream = PromptStream(make_prompts(3000), seed=0, shuffle=False)
    rewards = FakeRewards(lambda text, prompt: stable_seed(text) % 2 == 0 and stable_seed(prompt) % 3 > 0)
    rollout = Rollout(config, PLACEMENT, FakeEngine(draw), FakeTokenizer(), rewards)
    done, kept, put_off, resumed = [], [], 0, 0
    for step in range(8):
        batch = rollout.collect(stream, step)
        assert batch.counts.resumed_prompts == put_off
        assert batch.counts.discarded_tokens == 0
        put_off, resumed = batch.counts.unfinished_prompts, resumed + batch.counts.resumed_prompts
        kept.append(len(choose(batch.trees, config, step)))
        done += [tree.prompt_id for tree in batch.trees]
    assert min(kept) >= 10
    assert max(kept) <= 15
    assert resumed > 10
    assert len(set(done)) == len(done)
    assert any(int(name[1:]) % 5 == 0 for name in done)
    *waiting, following = [prompt.id for prompt in stream.peek(stream.returned + 1)]
    assert sorted(done + waiting) == sorted(f"p{i}" for i in range(int(following[1:])))


def test_what_was_put_off_is_sampled_anew_behind_a_checkpoint():
    config = ten_prompts("resume")
    stream = PromptStream(make_prompts(300), seed=0, shuffle=False)
    rollout = Rollout(config, PLACEMENT, FakeEngine(slow_last), FakeTokenizer(), None)
    assert rollout.collect(stream, 0).counts.unfinished_prompts == 2
    rollout.load_state_dict(rollout.state_dict())
    batch = rollout.collect(stream, 1)
    assert batch.counts.resumed_prompts == 0
    assert batch.counts.drawn_prompts == 10
    assert [tree.prompt_id for tree in batch.trees][:2] == ["p8", "p9"]


class TwoEngines:
    """In place of a collector: two of them in lockstep, the second with room for few prompts."""

    parked = ()

    def __init__(self, config, rewards, monkeypatch):
        self.config, self.rewards = config, rewards
        self.barrier, self.sums, self.place = threading.Barrier(2, timeout=30), [None, None], threading.local()
        self.given_up, self.holes = [], 0
        monkeypatch.setattr(queue_module, "dist", SimpleNamespace(all_reduce=self.all_reduce))

    def all_reduce(self, tensor, group):
        self.sums[self.place.engine] = tensor.clone()
        self.barrier.wait()
        total = self.sums[0] + self.sums[1]
        self.barrier.wait()
        tensor.copy_(total)

    def collect(self, prompts, queue, step, progress, returned, forks, prior, rare):
        def one(engine):
            self.place.engine = engine
            wanted = self.config.trainer.prompts_per_step
            mine = LockstepQueue("leaders", engine, 2, Wanted(wanted, wanted, len(prompts)))
            fake = FakeEngine(hazard_draw(0.12), max_requests=(10**9, 20)[engine])
            collector = Collector(self.config, fake, FakeTokenizer(), FakeRewards(self.rewards), None)
            return collector.collect(prompts, mine, step, progress, returned)

        both = Collection()
        with ThreadPoolExecutor(2) as pool:
            for part in pool.map(one, range(2)):
                both.trees += part.trees
                both.drawn += part.drawn
                both.unfinished += part.unfinished
        self.given_up += [prompts[number].id for number in both.unfinished]
        self.holes += max(both.drawn) >= len(both.drawn)
        return both


@pytest.mark.parametrize("unfinished", ["carry", "drop"])
def test_a_tail_cut_on_one_of_two_engines_skips_and_repeats_no_prompt(unfinished, monkeypatch):
    """One engine draws a number while the other, whose tail was cut, leaves a lower one."""
    config = make_config(
        {"tail_steps": 39, "unfinished": unfinished, "agreement_every": 8},
        run={"deterministic": True},
        filter={"max_prompts_factor": 3.5},
        trainer={"prompts_per_step": 12, "prompts_per_update": 12},
    )
    rollout = Rollout(config, PLACEMENT, FakeEngine(hazard_draw(0.1)), FakeTokenizer(), None)
    rollout.collector = engines = TwoEngines(
        config, lambda text, prompt: stable_seed(prompt) % 3 == 0 and stable_seed(text) % 2 == 0, monkeypatch
    )
    stream = PromptStream(make_prompts(2000), seed=0, shuffle=False)
    done = []
    for step in range(10):
        done += [tree.prompt_id for tree in rollout.collect(stream, step).trees]
    assert engines.holes > 2  # or nothing was tested
    assert len(engines.given_up) > 5
    if unfinished == "drop":
        done += engines.given_up
    *waiting, following = [prompt.id for prompt in stream.peek(stream.returned + 1)]
    assert sorted(done + waiting) == sorted(f"p{i}" for i in range(int(following[1:])))


def test_another_prompt_takes_the_place_of_a_lost_one_without_the_filter_too():
    engine = FakeEngine(hazard_draw(0.05))
    submit = engine.submit

    def losing(request):
        submit(request)
        if request.id.startswith("3:"):
            engine.fail.add(request.id)

    engine.submit = losing
    config = make_config({}, filter={"enabled": False}, trainer={"prompts_per_step": 10, "prompts_per_update": 10})
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    batch = Rollout(config, PLACEMENT, engine, FakeTokenizer(), None).collect(stream, 0)
    trees, counts = batch.trees, batch.counts
    assert [tree.prompt_id for tree in trees] == [f"p{i}" for i in range(11) if i != 3]
    assert counts.failed_prompts == 1
    assert stream.peek(1)[0].id == "p11"


def test_shuffled_rewards_keep_their_scores_and_the_prompts_that_are_trained_on():
    """The filter looks at what was earned: prompts that taught nothing do not come in by the shuffle."""
    rewards = FakeRewards(lambda text, prompt: stable_seed(text) % 3 / 2 if prompt in odd else 0.0)
    odd = {prompt.text for prompt in make_prompts(30)[1::2]}
    trainer = {"prompts_per_step": 8, "prompts_per_update": 8}

    def chosen(shuffle):
        reward = {"function": "m:f", "overlong_buffer_tokens": 16, "overlong_penalty": 0.5, "shuffle": shuffle}
        config = make_config({}, reward=reward, trainer=trainer)
        stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
        batch = Rollout(config, PLACEMENT, FakeEngine(hazard_draw(0.1)), FakeTokenizer(), rewards).collect(stream, 0)
        return choose(batch.trees, config, 0)

    def leaves(trees):
        return [(leaf.reward, leaf.score, leaf.correct) for tree in trees for leaf in tree.leaves]

    plain, shuffled = chosen(False), chosen(True)
    assert {tree.prompt_id for tree in plain} <= {prompt.id for prompt in make_prompts(30)[1::2]}
    assert [tree.prompt_id for tree in plain] == [tree.prompt_id for tree in shuffled]
    assert leaves(plain) != leaves(shuffled)
    assert sorted(leaves(plain)) == sorted(leaves(shuffled))


def boxing_tokenizer():
    """Whose answers are boxed: the number of their tokens; without a box where that is odd."""
    tokenizer = FakeTokenizer()
    tokenizer.decode = lambda tokens: f"\\boxed{{{len(tokens)}}}" if len(tokens) % 2 == 0 else "nothing"
    return tokenizer


def held_out(config, prompts, name=""):
    return HeldOut(name, prompts, config.held_out[name])


def answer_length(prompt, sample, config):
    """Of the fake engine's answer, from its seeds alone."""
    tree = Tree(f"{prompt.id}/{sample}", prompt.tokens)
    shape = sampled_shape(config.rollout)
    sampler = TreeSampler(tree, shape, RuleStopper(shape.stopping, None), (0, stable_seed(tree.prompt_id)), 0.0)
    (request,) = sampler.start().submit
    draw = hazard_draw(0.3)
    return next((n + 1 for n in range(20) if draw(request, n) == EOS_TOKEN), 20)


def test_evaluation_with_several_samples():
    """Against the same sums taken from the answers themselves; half of the prompts ask for 2."""
    prompts = [replace(prompt, answer=str(2 + 2 * (i % 2))) for i, prompt in enumerate(make_prompts(60))]
    config = make_config({}, data={"train": "t", "eval": "held_out.jsonl"}, trainer={"eval_samples": 5})
    engine, tokenizer = FakeEngine(hazard_draw(0.3)), boxing_tokenizer()
    with RewardPool(config.reward) as rewards:
        rollout = Rollout(config, PLACEMENT, engine, tokenizer, rewards)
        values = rollout.evaluate([held_out(config, prompts)])
        assert {request.temperature for request in engine.submitted} == {1.0}
        assert rollout.evaluate([held_out(config, prompts[::-1])]) == values  # draws belong to prompts
    assert len({request.seed for request in engine.submitted}) == 300
    sampling = held_out(config, prompts).sampling(config)
    lengths = [answer_length(prompt, k, sampling) for prompt in prompts for k in range(5)]
    expected = dict.fromkeys(("eval/accuracy", "eval/majority", "eval/pass@2", "eval/pass@4", "eval/best"), 0.0)
    for i, prompt in enumerate(prompts):
        mine = lengths[5 * i : 5 * i + 5]
        boxed = [length for length in mine if length % 2 == 0]
        right = mine.count(int(prompt.answer))
        expected["eval/accuracy"] += right / 300
        expected["eval/best"] += (right > 0) / 60
        for k in (2, 4):  # of all ways to choose k of the five, those that have a right one
            chosen = list(itertools.combinations(mine, k))
            expected[f"eval/pass@{k}"] += sum(int(prompt.answer) in some for some in chosen) / len(chosen) / 60
        expected["eval/majority"] += bool(boxed and max(boxed, key=boxed.count) == int(prompt.answer)) / 60
    assert shares(values) == pytest.approx(expected)
    assert all(values[f"{name}_low"] < share < values[f"{name}_high"] for name, share in expected.items())
    assert 0 < values["eval/accuracy"] < values["eval/majority"] < values["eval/best"] < 1


def test_evaluation_with_a_custom_function_has_scores_and_no_majority():
    data = {"train": "t", "eval": "held_out.jsonl"}
    config = make_config({}, data=data, trainer={"eval_samples": 4}, reward={"function": "m:f"})
    rewards = FakeRewards(lambda text, prompt: 0.75 if prompt == "prompt 1" else -0.25)
    rollout = Rollout(config, PLACEMENT, FakeEngine(hazard_draw(0.3)), FakeTokenizer(), rewards)
    values = rollout.evaluate([held_out(config, make_prompts(4))])
    assert shares(values) == {"eval/accuracy": 0.25, "eval/score": 0.0, "eval/pass@2": 0.25, "eval/best": 0.25}


def test_sets_of_held_out_prompts_have_settings_and_metrics_of_their_own():
    sets = {"short": {"path": "a.jsonl", "max_response_tokens": 2}, "hard": {"path": "b.jsonl", "temperature": 0.5}}
    config = make_config({}, data={"train": "t", "eval": sets})
    engine = FakeEngine(lambda request, position: 7)  # never ends by itself
    rewards = FakeRewards(lambda text, prompt: float(len(text.split()) == 2 or prompt == "prompt 0"))
    rollout = Rollout(config, PLACEMENT, engine, FakeTokenizer(), rewards)
    values = rollout.evaluate([held_out(config, make_prompts(4), name) for name in sets])
    assert shares(values) == {"eval/accuracy": 0.625, "eval/short/accuracy": 1.0, "eval/hard/accuracy": 0.25}
    assert [request.temperature for request in engine.submitted] == [0.0] * 4 + [0.5] * 4
    assert engine.requests == {}


def test_an_answer_that_its_engine_loses_is_wrong_and_counted():
    config = make_config({}, data={"train": "t", "eval": "held_out.jsonl"})
    engine = FakeEngine(hazard_draw(0.3))
    engine.submit = lambda request: (engine.fail.add(request.id), FakeEngine.submit(engine, request))
    rewards = FakeRewards(lambda text, prompt: 1.0)
    rollout = Rollout(config, PLACEMENT, engine, FakeTokenizer(), rewards)
    assert shares(rollout.evaluate([held_out(config, make_prompts(4))])) == {"eval/accuracy": 0.0, "eval/lost": 4}


def shares(values):
    """Without the intervals."""
    return {name: value for name, value in values.items() if not name.endswith(("_low", "_high"))}


@pytest.mark.parametrize(
    ("of_prompts", "low", "high"),
    [
        ([1.0] * 8 + [0.0] * 2, 0.4902, 0.9433),  # Wilson's interval of 8 in 10, by R's binom::binom.wilson
        ([0.0] * 10, 0.0, 0.2775),
        ([1.0] * 10, 0.7225, 1.0),
        ([1.0, 0.0], 0.0945, 0.9055),
        ([0.5] * 10, 0.5, 0.5),
        ([1.0], 0.2065, 1.0),
    ],
)
def test_intervals(of_prompts, low, high):
    assert interval(of_prompts) == pytest.approx((low, high), abs=1e-4)


def test_prompts_that_differ_less_than_right_and_wrong_have_a_narrower_interval():
    low, high = interval([0.5, 0.6, 0.4, 0.5] * 5)
    assert 0.46 < low < 0.5 < high < 0.54


@pytest.mark.parametrize(
    ("answers", "winner"),
    [(["1", "2", "2"], 1), (["2", "1", "1", "2"], 0), ([None, None, "1"], 2), ([None, None], None)],
)
def test_majority(answers, winner):
    assert majority(answers) == winner


def test_a_phase_without_a_tree_is_an_error():
    config = make_config({"tail_steps": 0}, trainer={"prompts_per_step": 4, "prompts_per_update": 4})
    stream = PromptStream(make_prompts(30), seed=0, shuffle=False)
    with pytest.raises(RuntimeError, match=r"no prompt was finished; see rollout\.tail_steps"):
        Rollout(config, PLACEMENT, FakeEngine(slow_last), FakeTokenizer(), None).collect(stream, 0)
