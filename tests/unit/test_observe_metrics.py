"""What a resumed run keeps of metrics.jsonl."""

import json

import pytest

from treepo_mcore.observe.metrics import MetricsLog


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(lines))


def steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_repeated_steps_go_and_the_evaluation_before_them_stays(tmp_path):
    values = [{"step": 1, "loss": 1}, {"step": 2, "eval/accuracy": 0.5}, {"step": 2, "loss": 2}, {"step": 3, "loss": 3}]
    write(tmp_path, *(json.dumps(line) + "\n" for line in values))
    MetricsLog(tmp_path, 2, 9).write(2, {"loss": 4})
    assert steps(tmp_path) == [*values[:2], {"step": 2, "loss": 4}]


def test_nothing_stays_when_a_run_starts_again(tmp_path):
    write(tmp_path, *(json.dumps(line) + "\n" for line in [{"step": 0, "eval/accuracy": 0.5}, {"step": 0, "loss": 1}]))
    MetricsLog(tmp_path, 0, 9)
    assert steps(tmp_path) == []


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    write(tmp_path, '{"step": 0, "loss": 1}\n', '{"step": 1, "lo')
    MetricsLog(tmp_path, 5, 9)
    assert steps(tmp_path) == [{"step": 0, "loss": 1}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    write(tmp_path, '{"step": 0, "lo\n', '{"step": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        MetricsLog(tmp_path, 5, 9)


def test_a_line_is_json_whatever_happened(tmp_path):
    MetricsLog(tmp_path, 0, 9).write(0, {"loss": float("nan"), "norm": float("inf"), "tokens": 3, "told": None})
    assert steps(tmp_path) == [{"step": 0, "loss": None, "norm": None, "tokens": 3, "told": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_last_evaluation_is_made_again(tmp_path):
    """A job that died behind it, while it exported, has no step to train; one that is given more steps keeps it."""
    lines = ['{"step": 8, "loss": 1}\n', '{"step": 9, "eval/accuracy": 0.5}\n']
    for steps, left in ((9, lines[:1]), (12, lines)):
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        MetricsLog(tmp_path, 9, steps)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(left)
