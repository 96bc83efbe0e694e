"""Reward functions that workers of the pool import by name."""

from __future__ import annotations

import os
import random
import time
from typing import Any


def last_word_is_even(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """Right for about half of all random answers."""
    return float(last_number(response) % 2 == 0)


def last_word_is_even_in_a_while(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """The same after up to half a second, never the same time twice."""
    time.sleep(random.random() / 2)
    return last_word_is_even(response, answer, prompt, row)


def scaled_by_the_row(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """A quarter of the row's `scale`, positive or negative."""
    return row["scale"] * (0.25 if last_number(response) % 2 == 0 else -0.25)


def mostly_fails(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """By the last word: hangs, raises, ends its process, or is right."""
    fate = last_number(response) % 4
    if fate == 0:
        time.sleep(3600)
    if fate == 1:
        raise RuntimeError("no verdict")
    if fate == 2:
        os._exit(7)
    return 1.0


def last_number(response: str) -> int:
    """Of the words w4, w5, ...; 0 where there is none."""
    words = response.split()
    return int(words[-1].lstrip("w")) if words else 0


def raises_for_one_in_ten(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """And else gives a point for an even number of characters."""
    if len(response) % 10 == 3:
        raise ValueError("a response of so many characters is refused")
    return float(len(response) % 2 == 0)
