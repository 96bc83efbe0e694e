"""Extracting and comparing boxed answers, and shaping the reward."""

import pytest

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.math import boxed_answer, extract_boxed, math_reward, normalise, quick_verdict
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
        (r"so \boxed {42}", "42"),
        (r"\fbox{42}", "42"),
        ("42", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


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
    ("text", "expected"), [(r"\boxed{1} \boxed{ $2$ }", "2"), (r"\boxed{$ $}", None), ("no box", None)]
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
