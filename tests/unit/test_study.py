"""Studies: what a file may say, what is kept of runs, and the figures that are made of them."""

import json
import math

import pytest
import yaml

from treepo_mcore.config import ConfigError
from treepo_mcore.study import runs as study_runs
from treepo_mcore.study.definition import Study, overrides, read_study
from treepo_mcore.study.page import page
from treepo_mcore.study.report import Interval, first_reached, markdown, ratio, table
from treepo_mcore.study.runs import Results, check_warm, outcome

STUDY = {
    "title": "A <study>",
    "config": "run.yaml",
    "seeds": [0, 1],
    "target": 0.5,
    "baseline": "flat",
    "settings": {"trainer.eval_every": 2},
    "arms": {"flat": {"rollout.sampler": "flat"}, "tree": {"rollout.tree.width": 4}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model": {"path": "m"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def written(folder, **changes):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes))
    return file


def test_a_run_sets_what_all_arms_set_and_what_its_own_sets(folder):
    study = read_study(written(folder))
    settings = study.settings_of("tree", 1)
    assert settings == {"trainer.eval_every": 2, "rollout.tree.width": 4, "run.seed": 1}
    assert overrides({"a.b": [[0, 4], [0.25, 8]], "c": None, "d": "x"}) == [
        "a.b=[[0, 4], [0.25, 8]]",
        "c=null",
        'd="x"',
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "falt"}, "study.yaml: baseline: no arm 'falt'; did you mean flat?"),
        ({"seeds": [1, 1]}, "seeds: expected each once"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"target": 75}, "target: input should be less than 1"),
        ({"arms": {"flat": {}}}, "arms: dictionary should have at least 2 items"),
        ({"arms": {"flat": {}, "a/b": {}}}, "arms: expected letters, digits, blanks"),
        ({"armes": {}}, "unknown key armes; did you mean arms?"),
        ({"config": "other.yaml"}, "arm flat: other.yaml: no such configuration file"),
        ({"arms": {"flat": {}, "tree": {"rollout.tree.widht": 4}}}, "arm tree: .*unknown key rollout.tree.widht"),
        ({"settings": {"trainer.eval_every": 0}}, "arm flat: expected data.eval and trainer.eval_every"),
        (
            {"warm": [0.15, 0.5], "settings": {"trainer.eval_every": 2, "trainer.eval_before": False}},
            "arm flat: warm needs trainer.eval_before",
        ),
    ],
)
def test_a_wrong_study_is_one_line(folder, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_study(written(folder, **changes))
    assert "\n" not in str(caught.value)


def made(arm, seed, accuracies, seconds=1.0, tokens=100):
    points = [[i, i * seconds, i * tokens, accuracy] for i, accuracy in enumerate(accuracies)]
    sums = {"steps": len(points), "seconds": points[-1][1], "decoded_tokens": points[-1][2]}
    shares = {"informative": 0.5, "tokens_per_informative": 2.0 * tokens}
    settings = Study.model_validate(STUDY).settings_of(arm, seed)
    return {"arm": arm, "seed": seed, "settings": settings, "points": points} | sums | shares


RISING = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_target_is_reached_between_evaluations_of_smoothed_accuracies():
    run = made("flat", 0, RISING, seconds=2.0)
    assert first_reached(run, 1, 0.5) == pytest.approx(5.0)
    assert first_reached(run, 2, 0.5) == pytest.approx(250)
    assert first_reached(run, 1, 0.05) == 0.0  # at the start: the mean of 0.0 and 0.2
    assert first_reached(run, 1, 0.95) is None  # the last mean is of two
    lucky = made("flat", 0, [0.0, 0.6, 0.0, 0.0, 0.0, 0.0])
    assert first_reached(lucky, 1, 0.5) is None


def test_ratios_are_of_pairs_with_an_interval():
    study = Study.model_validate(STUDY)
    runs = [made("flat", seed, RISING, seconds=2.0) for seed in (0, 1)]
    runs += [made("tree", 0, RISING, seconds=1.0), made("tree", 1, RISING, seconds=1.5)]
    found, lost = ratio(study, runs, "tree", 1)
    logs = [math.log(0.5), math.log(0.75)]
    assert (lost, found.n) == (0, 2)
    assert found.mean == pytest.approx(math.exp(sum(logs) / 2))
    half = 12.706 * abs(logs[0] - logs[1]) / 2  # sd / sqrt(2) of two values is half of their distance
    assert found.low == pytest.approx(found.mean * math.exp(-half))
    assert ratio(study, runs, "flat", 1)[0].mean == 1.0


def test_what_does_not_reach_the_target_is_counted():
    study = Study.model_validate(STUDY)
    never = [0.0] * 6
    runs = [made("flat", 0, RISING), made("flat", 1, never), made("tree", 0, never), made("tree", 1, never)]
    found, lost = ratio(study, runs, "tree", 1)
    assert lost == 2
    assert found.mean == pytest.approx(5 / 2.5)  # of seed 0 alone: its whole run against what flat needed
    assert found.low is None
    assert table(study, runs[:2])[0]["arm"] == "flat"


def test_a_normal_sample_has_the_interval_of_student():
    found = Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.high - found.mean) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert Interval.of([]) is None
    assert Interval.of([1.0]).show() == "1.000"


def test_what_is_kept_of_a_run():
    def step(number):
        work = {f"time/{part}": 0.5 for part in ("push", "rollout", "choose", "update")}
        kept = {"filter/kept": number / 4, "rollout/tokens_per_informative": 10.0 * number}
        return {"step": number, "rollout/decoded_tokens": 100, "time/step": 9.0} | work | kept

    rows = [step(0), step(1), {"step": 2, "eval/accuracy": 0.4}, step(2), step(3), {"step": 4, "eval/accuracy": 0.6}]
    assert outcome(rows) == {
        "steps": 4,
        "seconds": 8.0,  # of training: neither evaluation nor files
        "decoded_tokens": 400,
        "informative": 0.625,  # of the later half
        "tokens_per_informative": 25.0,
        "points": [[2, 4.0, 200, 0.4], [4, 8.0, 400, 0.6]],
    }


def test_results_go_on_and_refuse_what_cannot_be_compared(folder, monkeypatch):
    study, file = read_study(written(folder)), folder / "results" / "study.json"
    results = Results(file, study)
    results.add(made("flat", 0, RISING))
    again = Results(file, study)
    assert again.has("flat", 0)
    assert not again.has("flat", 1)
    other = read_study(written(folder, arms=STUDY["arms"] | {"flat": {"rollout.tree.width": 2}}))
    with pytest.raises(ConfigError, match=r"study.json: arm flat was run with other settings"):
        Results(file, other)
    monkeypatch.setattr(study_runs, "sources", lambda: "0")
    with pytest.raises(ConfigError, match=r"study.json: made with sources .*, now 0; move it away first"):
        Results(file, study)
    assert len(Results(file, study, grows=False).runs) == 1  # to look at


def test_a_model_that_is_not_warm_is_refused():
    study = Study.model_validate(STUDY | {"warm": [0.15, 0.5]})
    check_warm(study, made("flat", 0, [0.2, 0.9]))
    for accuracy in (0.1, 0.6):
        with pytest.raises(ConfigError, match=f"0.15 to 0.5 before training, found {accuracy:.3f}"):
            check_warm(study, made("flat", 0, [accuracy, 0.9]))


def test_the_table_and_the_page():
    study = Study.model_validate(STUDY)
    runs = [made(arm, seed, RISING) for arm in study.arms for seed in (0, 1)]
    text = markdown(study, runs)
    assert "| tree | 2 | 0.800 (0.800 to 0.800) | 1.00 (1.00 to 1.00) |" in text
    shown = page(study, runs)
    assert "A &lt;study&gt;" in shown
    assert shown.count("<polyline") == 4  # two arms, over seconds and over tokens
    assert json.dumps(shown)
