"""Boxes and repetition, at any chunk size and from any prefix."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_fake_engine import PIECES, decode

from treepo_mcore.config import StoppingConfig
from treepo_mcore.grow.stopping import REPETITION_STRIDE, BoxDetector, RuleStopper, Watch
from treepo_mcore.tree.tree import BOXED, EOS, FINISHED, REPETITION

CHARACTERS = "\\boxed{}a 1"


def by_character(tokens: list[int]) -> str:
    return "".join(CHARACTERS[token] for token in tokens)


def ids(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def feed_in_chunks(watch: Watch, tokens: list[int], rng: random.Random) -> tuple[int, str] | None:
    at = 0
    while at < len(tokens):
        size = rng.randint(1, 7)
        stop = watch.feed(tokens[at : at + size])
        if stop is not None:
            return at + stop[0], stop[1]
        at += size
    return None


def closing(text: str) -> int | None:
    """Where the first box of `text` closes, the slow way."""
    start = text.find("\\boxed{")
    if start < 0:
        return None
    nesting = 0
    for index in range(start + 6, len(text)):
        before = text[start + 7 : index]
        if (len(before) - len(before.rstrip("\\"))) % 2:  # an odd number of backslashes: not a brace of the box
            continue
        nesting += (text[index] == "{") - (text[index] == "}")
        if nesting == 0:
            return index
    return None


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("a \\boxed{1} a", 10),
        ("\\boxed{{1}{a}}}", 13),
        ("\\boxed{a", None),
        ("\\boxe{a} } }", None),
        ("\\\\boxed{}", 8),
        ("\\b\\boxed{a}", 10),
        ("boxed{a}", None),
        ("\\boxed{\\}a}a", 10),
        ("\\boxed{\\{a}}", 10),
        ("\\boxed{\\\\}a}", 9),
    ],
)
def test_boxes_by_hand(text, closed):
    detector = BoxDetector(by_character)
    watch = RuleStopper(StoppingConfig(boxed="boxed", repetition_count=0), detector).watch([])
    expected = None if closed is None else (closed + 1, BOXED)
    assert watch.feed(ids(text)) == expected
    assert detector.closes(ids(text)) == (closed is not None)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, len(PIECES) - 1), max_size=30), st.integers(0, 10**6))
def test_boxes_in_any_tokens_and_chunks(tokens, seed):
    rng = random.Random(seed)
    text, closed = decode(tokens), closing(decode(tokens))
    expected = None
    if closed is not None:
        expected = next(n for n in range(len(tokens) + 1) if len(decode(tokens[:n])) > closed), BOXED
    stopper = RuleStopper(StoppingConfig(boxed="boxed", repetition_count=0), BoxDetector(decode))
    assert feed_in_chunks(stopper.watch([]), tokens, rng) == expected, text
    prefix = rng.randint(0, expected[0] - 1 if expected else len(tokens))  # a sibling starts from the recorded prefix
    rest = feed_in_chunks(stopper.watch(tokens[:prefix]), tokens[prefix:], rng)
    assert rest == (expected and (expected[0] - prefix, BOXED))


@pytest.mark.parametrize(
    ("mode", "text", "reason"),
    [
        ("boxed_and_eos", "\\boxed{a} a", FINISHED),
        ("boxed_and_eos", "\\boxed{a a", EOS),
        ("boxed", "a", EOS),
        ("none", "\\boxed{a}", EOS),
    ],
)
def test_reason_of_an_eos(mode, text, reason):
    stopper = RuleStopper(StoppingConfig(boxed=mode), BoxDetector(by_character))
    assert stopper.eos_reason(ids(text)) == reason


def test_a_box_alone_does_not_end_a_path_under_boxed_and_eos():
    stopper = RuleStopper(StoppingConfig(boxed="boxed_and_eos"), BoxDetector(by_character))
    assert stopper.watch([]).feed(ids("\\boxed{a} a")) is None


def test_looking_for_boxes_needs_a_detector():
    with pytest.raises(ValueError, match="boxed_and_eos needs a BoxDetector"):
        RuleStopper(StoppingConfig(), None)
    RuleStopper(StoppingConfig(boxed="none"), None)


def repetition(count: int = 4, period: int = 5, minimum: int = 16) -> RuleStopper:
    config = StoppingConfig(
        boxed="none", repetition_count=count, repetition_period=period, repetition_min_tokens=minimum
    )
    return RuleStopper(config, None)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 60),
    st.integers(1, 8),
    st.integers(0, 80),
    st.integers(2, 5),
    st.integers(1, 30),
)
def test_repetition_against_the_definition(seed, lead, period, repeated, count, minimum):
    rng = random.Random(seed)
    unit = [rng.randrange(4) for _ in range(period)]
    tokens = [rng.randrange(4) for _ in range(lead)] + (unit * 80)[:repeated] + [rng.randrange(9) for _ in range(20)]

    def repeats(end: int) -> bool:
        for p in range(1, 6):
            span = max(count * p, minimum)
            if span <= end and all(tokens[i] == tokens[i - p] for i in range(end - span + p, end)):
                return True
        return False

    looks = range(REPETITION_STRIDE, len(tokens) + 1, REPETITION_STRIDE)
    stopper = repetition(count, 5, minimum)
    expected = next(((end, REPETITION) for end in looks if repeats(end)), None)
    assert feed_in_chunks(stopper.watch([]), tokens, rng) == expected
    prefix = rng.randint(0, expected[0] - 1 if expected else len(tokens))
    rest = feed_in_chunks(stopper.watch(tokens[:prefix]), tokens[prefix:], rng)
    assert rest == (expected and (expected[0] - prefix, REPETITION))


def test_long_numbers_and_lists_are_no_repetition():
    watch = RuleStopper(StoppingConfig(boxed="none"), None).watch([])
    listing = [token for number in range(100, 200) for token in (1, 2, number)]
    assert watch.feed(listing) is None
    assert RuleStopper(StoppingConfig(boxed="none"), None).watch([]).feed([7] * 63) is None
    assert RuleStopper(StoppingConfig(boxed="none"), None).watch([]).feed([7] * 64) == (64, REPETITION)


def test_repetition_before_a_box_in_one_chunk_comes_first():
    config = StoppingConfig(boxed="boxed", repetition_count=4, repetition_period=2, repetition_min_tokens=8)
    stopper = RuleStopper(config, BoxDetector(by_character))
    assert stopper.watch([]).feed(ids("a" * 20 + "\\boxed{1}")) == (16, REPETITION)
    assert stopper.watch([]).feed(ids("a" * 6 + "\\boxed{1}" + "a" * 20)) == (15, BOXED)
