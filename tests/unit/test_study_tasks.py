"""The studies' tasks: right answers, no problem twice, the same bytes again."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import tasks


def checked(text: str, answer: int) -> None:
    """Every sum that is written is right, and so is the box."""
    for left, right, total in re.findall(r"(\d+)\+(\d+)=(\d+)", text):
        assert int(left) + int(right) == int(total)
    assert text.endswith(f"\\boxed{{{answer}}}")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_solutions_are_right_with_care_and_in_haste(name):
    rng = random.Random(0)
    for hard in (False, True):
        for _ in range(100):
            problem = tasks.TASKS[name].draw(rng, hard)
            numbers = re.sub(r"Count to \d+", "", problem.prompt)
            assert sum(map(int, re.findall(r"\d+", numbers))) == problem.answer
            careful = tasks.solve(problem, [False] * len(problem.parts))
            hasty = tasks.solve(problem, [True] * len(problem.parts))
            checked(careful, problem.answer)
            checked(hasty, problem.answer)
            assert careful.startswith(problem.begin)
            assert hasty.startswith(problem.begin)
            assert len(hasty) < len(careful)


def test_the_same_arguments_give_the_same_bytes_and_no_problem_twice(tmp_path):
    for folder in ("one", "other"):
        tasks.write_data(tasks.TASKS["count"], tmp_path / folder, seed=3, train=200, held_out=20)
    names = ["eval.jsonl", "hard.jsonl", "sft.jsonl", "train.jsonl"]
    assert [file.name for file in sorted((tmp_path / "one").iterdir())] == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()

    def rows(name):
        return [json.loads(line) for line in (tmp_path / "one" / f"{name}.jsonl").read_text().splitlines()]

    prompts = [row["prompt"] for row in rows("train") + rows("eval")]
    assert len(set(prompts)) == len(prompts) == 220
    hasty = [" =" in row["solution"] for row in rows("sft")]
    assert 0.6 < sum(hasty) / len(hasty) < 0.8
