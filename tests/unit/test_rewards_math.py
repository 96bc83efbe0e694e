"""Extracting and comparing boxed answers, and shaping the reward."""

import json
import logging
from pathlib import Path

import pytest

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.answers import tell_unreadable
from treepo_mcore.rewards.math import boxed_answer, final_answer, math_reward, normalise, quick_verdict
from treepo_mcore.rewards.shaping import shape


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{}", ""),
        (r"\boxed{3} then \boxed{4", "3"),  # the last one that is complete
        (r"\boxed{0} hence $x = \boxed{1}$ and $y = \boxed{2}$.", "1, 2"),  # several at the end are one answer
        (r"\boxed{3}, or \boxed{4}, or \boxed{3}", "3, 4"),
        (r"so \boxed {42}", "42"),
        (r"\fbox{42}", "42"),
        ("42", None),
        ("", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" $12$ . ", "12"),
        (r"\$1,234,567", "1234567"),
        ("x + 1", "x+1"),
        ("1 1/2", "1 1/2"),
        ("1,2,3", "1,2,3"),
        ("(1,234)", "(1,234)"),
        ("12,3456", "12,3456"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{007}", "7", True),
        (r"\boxed{+7}", "7", True),
        (r"\boxed{8}", "7", False),
        ("no box, 7", "7", False),
        (r"\boxed{}", "", False),
        (r"\boxed{0.5}", "1/2", None),
        (r"\boxed{x+1}", "1+x", None),
    ],
)
def test_quick_verdict(response, answer, expected):
    assert quick_verdict(response, answer) is expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"\boxed{7}", "7", 1.0),
        (r"\boxed{7}", "8", 0.0),
        ("7", "7", 0.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{x+1}", "1+x", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"\boxed{x+1}", "x+2", 0.0),
        (r"\boxed{\frac{1}{}", "0.5", 0.0),
        (r"\boxed{\frac{1}{3}}", "0.5", 0.0),
    ],
)
def test_math_reward(response, answer, expected):
    assert math_reward(response, answer, "", {}) == expected


@pytest.mark.parametrize(
    ("score", "tokens", "expected"),
    [(1.0, 80, 1.0), (0.0, 80, -1.0), (1.0, 90, 0.75), (1.0, 100, 0.5), (0.0, 100, -1.5), (1.0, 120, 0.5)],
)
def test_shape_over_the_last_twenty_tokens(score, tokens, expected):
    config = RewardConfig(overlong_buffer_tokens=20, overlong_penalty=0.5)
    assert shape(score, tokens, 100, config) == pytest.approx(expected)


def test_the_score_of_a_custom_function_is_the_reward():
    config = RewardConfig(function="m:f", overlong_buffer_tokens=20, overlong_penalty=0.5)
    assert [shape(score, 80, 100, config) for score in (0.2, 0.9, 0.0, -3.0)] == [0.2, 0.9, 0.0, -3.0]
    assert shape(0.2, 100, 100, config) == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("text", "expected"), [(r"\boxed{1} so \boxed{ $2$ }", "2"), (r"\boxed{$ $}", None), ("no box", None)]
)
def test_boxed_answer(text, expected):
    assert boxed_answer(text) == expected


def test_shape_without_a_buffer_has_no_penalty():
    config = RewardConfig(correct=2.0, wrong=0.5)
    assert [shape(score, 100, 100, config) for score in (0.3, 0.0, -1.0)] == [2.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("found", "gold", "equal"),
    [
        ("1,000", "1000", True),
        (r"1{,}000", "1000", True),
        (r"1\,000,000", "1000000", True),
        ("1,234.50", "1234.50", True),
        ("200, 100", "100, 200", True),
        ("200, 100", "200,100", True),
        ("100200", "100, 200", False),
        ("(1,234)", "(1, 234)", True),
        (r"\{1,234\}", r"\{1, 234\}", True),
        (r"\{1234\}", r"\{1, 234\}", False),
    ],
)
def test_a_thousands_comma_is_of_one_whole_number(found, gold, equal):
    assert bool(math_reward(f"\\boxed{{{found}}}", gold, "", {})) is equal


def test_the_list_of_pairs():
    """Over all kinds of answers; `math_verify` alone gets 113 of the first 732 wrong, 20 of them false positives."""
    pairs = [json.loads(line) for line in (Path(__file__).parent / "data" / "grading.jsonl").open()]
    wrong = [
        pair
        for pair in pairs
        if bool(math_reward(f"\\boxed{{{pair['answer']}}}", pair["gold"], "", {})) != pair["equal"]
    ]
    assert not [pair for pair in wrong if not pair["equal"]], "unequal answers that count as right"
    assert len(wrong) <= len(pairs) // 100, wrong


@pytest.mark.parametrize(
    ("found", "gold", "equal"),
    [
        ("1e16", "1e+16", True),
        ("0.00005", "5e-05", True),
        ("1234.56", "1234.56005859375", True),  # of a float32 column
        ("1234.57", "1234.56005859375", False),
        (r"\frac{2\pi}{3}", "2.0943951023931953", True),
        ("2.0943951023931953", r"\frac{2\pi}{3}", False),  # a rounded answer to an exact reference
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
        ("2^{100}+1", "2^{100}", False),
        ("nan", "nan", False),
    ],
)
def test_numbers_are_compared_relatively(found, gold, equal):
    assert bool(math_reward(f"\\boxed{{{found}}}", gold, "", {})) is equal


def test_answers_that_only_their_own_characters_meet_are_told_once(caplog):
    answers = {"a": "x^2", "b": r"\frac{1}{", "c": "Monday", "d": "12", "e": "(1,2]", "f": r"9^{9^{9^9}}", "g": "x+"}
    with caplog.at_level(logging.WARNING):
        assert tell_unreadable(Path("train.jsonl"), answers) == ["b", "g"]
    assert r"2 of 6 answers looked at are read neither as mathematics nor as text, such as" in caplog.text
    assert [record.name for record in caplog.records] == ["treepo_mcore.rewards.answers"]


def test_boxes_without_end_are_read_in_one_pass():
    """A model that repeats itself; looked at box by box this would take hours, in the trainer's own process."""
    assert quick_verdict(r"\boxed{" * 200_000, "7") is False
    assert quick_verdict(r"\boxed{7} " + r"\boxed{" * 200_000, "7") is True


@pytest.mark.parametrize(
    ("found", "answer", "verdict"),
    [
        ("{" * 30 + "7" + "}" * 30, "7", False),  # so deep that a parser would not come back
        ("{" * 10 + "7" + "}" * 10, "7", None),
        ("x+" * 2_000 + "x", "x", False),
        ("x+" * 2_000 + "x", "y+" * 2_000 + "y", None),  # as long as the answer
        ("9^{9^{9}}", "7", None),
    ],
)
def test_what_is_far_longer_or_deeper_than_the_answer_is_wrong(found, answer, verdict):
    assert quick_verdict(rf"\boxed{{{found}}}", answer) is verdict
