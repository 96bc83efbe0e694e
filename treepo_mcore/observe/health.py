"""What a run's numbers say of its health: signatures of known failures, each with its evidence and what to change.

All of them read lines of metrics.jsonl alone, so a finished run can be looked at as well as one under way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from treepo_mcore.observe.observer import Observer, Wish, run_values
from treepo_mcore.records import Step

WINDOW = 5  # steps that are looked at together
LEAST = 2 * WINDOW  # steps before anything is said: the first ones are what later ones are compared with

Row = dict[str, Any]  # of metrics.jsonl

log = logging.getLogger(__name__)


class Finding(NamedTuple):
    """One signature that was found."""

    name: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Window:
    """The newest steps of a run, and its first ones."""

    first: Sequence[Row]
    newest: Sequence[Row]

    def now(self, name: str) -> float | None:
        """Mean over the newest steps that have it."""
        return _mean(self.newest, name)

    def then(self, name: str) -> float | None:
        """Mean over the first steps that have it."""
        return _mean(self.first, name)

    def ended(self, reason: str) -> float:
        """Share of the newest steps' answers that ended by it; steps without one do not have the name."""
        return sum(row.get(f"rollout/ended_{reason}") or 0 for row in self.newest) / len(self.newest)

    def share(self, part: str, *whole: str) -> float | None:
        """Of two sums over the newest steps."""
        parts = [row[part] for row in self.newest if row.get(part) is not None]
        wholes = [row[name] for row in self.newest for name in whole if row.get(name) is not None]
        return sum(parts) / sum(wholes) if parts and sum(wholes) else None


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None


def _little_to_learn(window: Window) -> Finding | None:
    kept, accuracy = window.now("filter/kept"), window.now("reward/accuracy")
    if kept is None or accuracy is None or kept >= 0.2:
        return None
    advice = "prompts are each all right or all wrong: more leaves (rollout.tree.width), prompts of middling difficulty"
    if accuracy > 0.8:
        advice = "the prompts are too easy: harder ones, or let solved ones rest (filter.longest_rest)"
    elif accuracy < 0.2:
        advice = "the prompts are too hard: easier ones, supervised training first, or longer answers"
    return Finding(
        "little to learn", f"{kept:.0%} of the prompts teach anything, at an accuracy of {accuracy:.2f}", advice
    )


def _entropy_collapse(window: Window) -> Finding | None:
    now, then = window.now("actor/entropy"), window.then("actor/entropy")
    if now is None or then is None or now >= 0.2 * then:
        return None
    return Finding(
        "entropy collapse",
        f"{now:.3f} nats a token, {then:.3f} at the start: answers to a prompt become one answer",
        "lower actor.optimizer.lr, raise actor.loss.clip_high or entropy_coef; actor.min_entropy ends such a run",
    )


def _length_drift(window: Window) -> Finding | None:
    now, then = window.now("rollout/response_tokens_mean"), window.then("rollout/response_tokens_mean")
    if now is None or not then or 0.5 * then <= now <= 2 * then:
        return None
    advice = "see whether accuracy follows; else reward.overlong_buffer_tokens, or actor.loss.aggregation: fixed_length"
    if now < then:
        advice = "see whether accuracy falls with it; else the answers were longer than they had to be"
    return Finding("length drift", f"{now:.0f} tokens an answer, {then:.0f} at the start", advice)


def _cut_answers(window: Window) -> Finding | None:
    cut = window.ended("length") + window.ended("depth")
    if cut <= 0.3:
        return None
    return Finding(
        "cut answers",
        f"{cut:.0%} of the answers end because they may not be longer",
        "raise rollout.tree.max_depth or segment_tokens, or teach shorter ones (reward.overlong_buffer_tokens)",
    )


def _repetition(window: Window) -> Finding | None:
    share = window.ended("repetition")
    if share <= 0.1:
        return None
    return Finding(
        "repetition",
        f"{share:.0%} of the answers end in a loop",
        "a sign of too high a learning rate, or of a model without an end-of-text token in its template",
    )


def _pruned_hard(window: Window) -> Finding | None:
    share = window.ended("pruned")
    if share <= 0.5:
        return None
    return Finding(
        "pruning too hard",
        f"{share:.0%} of the paths are pruned, which never answer",
        "weaken rollout.tree.pruning; its paths count as wrong, so what it dislikes is unlearned",
    )


def _shallow(window: Window) -> Finding | None:
    effective, leaves, prompts = (
        window.now(f"rollout/{name}") for name in ("effective_leaves", "leaves", "drawn_prompts")
    )
    if effective is None or not leaves or not prompts or leaves / prompts < 4 or effective >= 0.4 * leaves / prompts:
        return None
    return Finding(
        "answers too much alike",
        f"{leaves / prompts:.1f} answers a prompt are worth {effective:.1f} independent ones",
        "more first paths (rollout.tree.branching.first) and later forks; or branching.schedule: auto",
    )


def _decided_early(window: Window) -> Finding | None:
    decided = window.now("tree/decided")
    if decided is None or decided <= 0.9:
        return None
    return Finding(
        "decided before the forks",
        f"{decided:.0%} of what answers differ by is settled at half their length",
        "fork earlier: branching.schedule: auto plans by it; `treepo-mcore trees curve` shows where",
    )


def _cache_pressure(window: Window) -> Finding | None:
    share = window.share("rollout/preemptions", "rollout/requests")
    if share is None or share <= 0.05:
        return None
    return Finding(
        "key-value cache too small",
        f"{share:.0%} of the requests lost their cache and were computed again",
        "raise rollout.engine.gpu_memory_utilization or kv_cache_memory_bytes, or lower max_num_seqs",
    )


def _failing_rewards(window: Window) -> Finding | None:
    share = window.share("reward/failed", "rollout/leaves")
    if share is None or share <= 0.02:
        return None
    return Finding(
        "reward calls fail",
        f"{share:.0%} of them raise, run too long or end their process; the log has the first",
        "mend the function, or raise reward.timeout, memory_gib, workers; such answers count as reward.failed says",
    )


def _apart(window: Window) -> Finding | None:
    distance, samples = window.now("mismatch/logprob_abs_mean") or 0.0, window.now("mismatch/effective_samples")
    samples = 1.0 if samples is None else samples
    if distance <= 0.05 and samples >= 0.5:
        return None
    return Finding(
        "engine and actor apart",
        f"{distance:.3f} nats a token, and {samples:.0%} of the samples' weight left",
        "actor.old_logprobs: actor, a correction (actor.correction), rollout.dtype as actor.dtype",
    )


def _clipped(window: Window) -> Finding | None:
    share = window.now("actor/clipped")
    if share is None or share <= 0.3:
        return None
    return Finding(
        "updates too large",
        f"{share:.0%} of the tokens are clipped",
        "lower actor.optimizer.lr, or fewer updates of one rollout (trainer.prompts_per_update)",
    )


def _form_hacking(window: Window) -> Finding | None:
    accuracy, before = window.now("reward/accuracy"), window.then("reward/accuracy")
    if accuracy is None or before is None or accuracy >= before - 0.05:
        return None
    names = [name for name in window.newest[-1] if name.startswith("reward/") and name.endswith("/mean")]
    risen = [
        (name, then, now) for name in names if (then := window.then(name)) is not None and (now := window.now(name))
    ]
    risen = [(name, then, now) for name, then, now in risen if now > then + 0.1]
    if not risen:
        return None
    name, then, now = risen[0]
    return Finding(
        "a component is won and the task lost",
        f"{name} {then:.2f} to {now:.2f} while accuracy went from {before:.2f} to {accuracy:.2f}",
        f"lower the weight of {name.split('/')[1]} in reward.components, or pay it for correct answers only",
    )


def _skipped(window: Window) -> Finding | None:
    skipped = sum(row.get("actor/skipped") or 0 for row in window.newest)
    if not skipped:
        return None
    return Finding(
        "gradients that are not finite",
        f"{skipped:.0f} updates of the last {len(window.newest)} steps were left out",
        "look at their losses; lower actor.optimizer.lr, or raise actor.dtype",
    )


SIGNATURES: tuple[Callable[[Window], Finding | None], ...] = (
    _little_to_learn,
    _entropy_collapse,
    _length_drift,
    _cut_answers,
    _repetition,
    _pruned_hard,
    _shallow,
    _decided_early,
    _cache_pressure,
    _failing_rewards,
    _apart,
    _clipped,
    _form_hacking,
    _skipped,
)


def look(rows: Sequence[Row]) -> list[Finding]:
    """Of the newest of these steps; nothing before there are `LEAST`."""
    if len(rows) < LEAST:
        return []
    window = Window(rows[:WINDOW], rows[-WINDOW:])
    return [found for signature in SIGNATURES if (found := signature(window))]


def history(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Finding]]]:
    """What was new at each step that had anything new: a finding that stays is told once."""
    known: set[str] = set()
    for end in range(LEAST, len(rows) + 1):
        found = look([*rows[:WINDOW], *rows[end - WINDOW : end]])
        if fresh := [finding for finding in found if finding.name not in known]:
            yield rows[end - 1], fresh
        known = {finding.name for finding in found}


class Health(Observer):
    """Tells what is found while the run goes on. Rank 0 makes one."""

    def __init__(self) -> None:
        self.rows: list[Row] = []  # the first ones and the newest
        self.known: set[str] = set()

    def trained(self, step: Step) -> Wish:
        """A warning for what is new."""
        self.rows.append(run_values(step))
        del self.rows[WINDOW:-WINDOW]
        found = look(self.rows)
        for finding in found:
            if finding.name not in self.known:
                log.warning("step %d: %s: %s; %s", step.number + 1, *finding)
        self.known = {finding.name for finding in found}
        return Wish.NOTHING
