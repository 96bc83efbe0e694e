"""Signatures of failures in a run's metrics: each provoked, and a healthy run silent."""

import json
import logging

import pytest
from test_report import run_directory
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.observe.health import LEAST, SIGNATURES, WINDOW, Health, history, look
from treepo_mcore.records import Batch, Counts, Step

# Of a step of the quickstart.
HEALTHY = {
    "reward/mean": 0.4,
    "reward/accuracy": 0.4,
    "reward/form/mean": 0.5,
    "reward/failed": 0,
    "rollout/leaves": 464,
    "rollout/drawn_prompts": 64,
    "rollout/effective_leaves": 6.0,
    "rollout/response_tokens_mean": 25.4,
    "rollout/ended_boxed": 1.0,
    "rollout/requests": 464,
    "rollout/preemptions": 0,
    "tree/decided": 0.46,
    "filter/kept": 0.67,
    "actor/entropy": 0.108,
    "actor/clipped": 0.005,
    "actor/skipped": 0.0,
    "mismatch/logprob_abs_mean": 3.6e-07,
    "mismatch/effective_samples": 1.0,
}
SICK = {
    "little to learn": {"filter/kept": 0.1},
    "entropy collapse": {"actor/entropy": 0.01},
    "length drift": {"rollout/response_tokens_mean": 60.0},
    "cut answers": {"rollout/ended_length": 0.2, "rollout/ended_depth": 0.2},
    "repetition": {"rollout/ended_repetition": 0.2},
    "pruning too hard": {"rollout/ended_pruned": 0.6},
    "answers too much alike": {"rollout/effective_leaves": 2.0},
    "decided before the forks": {"tree/decided": 0.95},
    "key-value cache too small": {"rollout/preemptions": 40},
    "reward calls fail": {"reward/failed": 20},
    "engine and actor apart": {"mismatch/logprob_abs_mean": 0.1},
    "updates too large": {"actor/clipped": 0.4},
    "a component is won and the task lost": {"reward/form/mean": 0.9, "reward/accuracy": 0.3},
    "gradients that are not finite": {"actor/skipped": 1.0},
}


def run(*parts):
    """Rows of a run of several stretches: (steps, what differs from a healthy one)."""
    rows = [HEALTHY | changes for steps, changes in parts for _ in range(steps)]
    return [row | {"step": step} for step, row in enumerate(rows)]


def test_a_healthy_run_is_silent():
    assert list(history(run((40, {})))) == []


def test_all_signatures_are_provoked_here():
    assert len(SICK) == len(SIGNATURES)


@pytest.mark.parametrize("name", SICK)
def test_a_signature_is_found_alone_and_named_once(name):
    rows = run((LEAST, {}), (20, SICK[name]))
    ((row, (found,)),) = history(rows)
    assert found.name == name
    assert LEAST <= row["step"] < LEAST + WINDOW
    assert "\n" not in found.evidence + found.advice


def test_what_comes_back_is_told_again():
    rows = run((10, {}), (10, SICK["repetition"]), (10, {}), (10, SICK["repetition"]))
    assert len(list(history(rows))) == 2


@pytest.mark.parametrize(
    ("accuracy", "words"), [(0.95, "too easy"), (0.02, "too hard"), (0.5, "all right or all wrong")]
)
def test_little_to_learn_says_why(accuracy, words):
    ((_, (found,)),) = history(run((20, {"filter/kept": 0.1, "reward/accuracy": accuracy})))
    assert words in found.advice


def test_nothing_is_said_of_few_steps_or_of_numbers_that_are_not_there():
    assert look(run((LEAST - 1, SICK["repetition"]))) == []
    assert look([{"step": step} for step in range(20)]) == []
    assert look([dict.fromkeys(HEALTHY) | {"step": step} for step in range(20)]) == []


def test_a_run_tells_it_while_it_goes_on(caplog):
    observer = Health()
    with caplog.at_level(logging.WARNING):
        for row in run((LEAST, {}), (15, SICK["cut answers"])):
            observer.trained(Step(row["step"], Batch([], 0, Counts()), values=row))
    assert len(observer.rows) == 2 * WINDOW
    (told,) = caplog.messages
    assert told.startswith("step 14: cut answers: 32% of the answers end")


def test_the_command_and_the_report_say_since_when(tmp_path):
    folder = run_directory(tmp_path / "run")
    result = CliRunner().invoke(app, ["health", str(folder)])
    assert (result.exit_code, result.output) == (0, f"3 steps, {LEAST} are needed\n")
    rows = [row | {"time/step": 1.0} for row in run((LEAST, {}), (20, SICK["repetition"]))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["health", str(folder), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert (found["name"], found["since_step"]) == ("repetition", 12)
    assert "since step 13: repetition: 20% of" in CliRunner().invoke(app, ["health", str(folder)]).output
    CliRunner().invoke(app, ["report", str(folder)])
    assert "<td>step 13</td><td><b>repetition</b>" in (folder / "report.html").read_text()
