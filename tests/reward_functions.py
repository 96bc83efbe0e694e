"""Reward functions that workers of the pool import by name."""

from __future__ import annotations

import os
import time


def last_word_is_even(response: str, answer: str, prompt: str) -> float:
    """Right for about half of all random answers."""
    words = response.split()
    return 1.0 if words and int(words[-1].lstrip("w")) % 2 == 0 else 0.0


def hangs_on_even(response: str, answer: str, prompt: str) -> float:
    """Never comes back for some answers."""
    if last_word_is_even(response, answer, prompt):
        time.sleep(3600)
    return 1.0


def raises_or_dies(response: str, answer: str, prompt: str) -> float:
    """Fails in two ways."""
    if last_word_is_even(response, answer, prompt):
        raise RuntimeError("no verdict")
    os._exit(7)
