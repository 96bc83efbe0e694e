"""A look at the reference answers before a run trains on them: can another spelling than their own meet them?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.notation import number, one_spelling
from treepo_mcore.rewards.pool import RewardPool

log = logging.getLogger(__name__)

LOOKS = 500  # answers, at most; the rest of a large file is of the same kinds
SECONDS = 4.0  # an answer; the first of a worker on a slow machine takes more than one


def tell_unreadable(file: Path, answers: Mapping[str, str]) -> list[str]:
    """Warn once, with a count and an example, of answers that the grader cannot read as mathematics, text or a list.

    answers: prompt id -> answer. Returns the ids. Numbers are not looked at, they can be read.
    """
    others = {answer: name for name, answer in answers.items() if number(one_spelling(answer)) is None}
    looked = dict(list(others.items())[:LOOKS])
    if not looked:
        return []
    config = RewardConfig(function="treepo_mcore.rewards.math:answer_is_readable", timeout=SECONDS)
    with RewardPool(config) as pool:
        for answer, name in looked.items():
            pool.submit(name, "", answer, "", {})
        # A call that failed, such as on a machine too busy for it in time, says nothing of its answer.
        unread = sorted(str(result.key) for result in pool.drain() if not result.correct and result.error is None)
    if unread:
        example = next(answer for answer, name in looked.items() if name == unread[0])
        log.warning(
            "%s: %d of %d answers looked at are read neither as mathematics nor as text, such as %r of prompt %s: only "
            "the same characters are right",
            file,
            len(unread),
            len(looked),
            example,
            unread[0],
        )
    return unread
