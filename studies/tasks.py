"""Tasks that differ in where an answer's outcome is decided; data, tokenizer and warm model of one of them.

    python studies/tasks.py sums --out .cache/tasks/sums

As in the quickstart, the text that a model grows up on takes its steps carefully or jumps to a result in haste, which a
small model can copy but not compute; reinforcement learning finds that care pays. What differs is where that happens:

sums      sixteen numbers in four parts, each part added up with care or in haste: any slip spoils the answer, so that
          the outcome is decided bit by bit.
count     first count to a number, which is long and easy, then add four numbers: decided at the end.
context   a long list of names that does not matter, then four numbers: a long prompt with a short answer.

`hard.jsonl` has problems of a kind that is not in the training data: six parts, a longer count, five numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
NAMES = ("Tom", "Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia")


@dataclass(frozen=True)
class Problem:
    """Parts of numbers that are added up, behind a text that every answer begins with."""

    prompt: str
    begin: str  # of every answer
    parts: tuple[tuple[int, ...], ...]

    @property
    def answer(self) -> int:
        return sum(map(sum, self.parts))


@dataclass(frozen=True)
class Task:
    draw: Callable[[random.Random, bool], Problem]  # (random numbers, whether of the harder kind)
    haste: float  # the share of parts that the text jumps over
    prompt_tokens: int  # at most
    response_tokens: int  # at most
    vocab: int  # words of the tokenizer; there are few pieces to choose from


def sums(rng: random.Random, hard: bool) -> Problem:
    """Four parts of four numbers."""
    parts = tuple(tuple(rng.randint(1, 9) for _ in range(4)) for _ in range(6 if hard else 4))
    text = ", ".join(" ".join(map(str, part)) for part in parts)
    return Problem(f"Add {text}.\nAnswer:", "", parts)


def count(rng: random.Random, hard: bool) -> Problem:
    """A long easy beginning, the same length for all but a tenth, then one part."""
    until, part = rng.randint(44, 48) if hard else rng.randint(36, 40), _part(rng, 4)
    text = f"Count to {until}, then add {' '.join(map(str, part))}.\nAnswer:"
    return Problem(text, "".join(f" {number}" for number in range(1, until + 1)) + ";", (part,))


def context(rng: random.Random, hard: bool) -> Problem:
    """One part behind a list of names."""
    part = _part(rng, 5 if hard else 4)
    names = " ".join(rng.choices(NAMES, k=200))
    return Problem(f"{names}. Add {' '.join(map(str, part))}.\nAnswer:", "", (part,))


def _part(rng: random.Random, numbers: int) -> tuple[int, ...]:
    """The first number has two digits."""
    return (rng.randint(11, 49), *(rng.randint(2, 19) for _ in range(numbers - 1)))


TASKS = {
    "sums": Task(sums, 0.35, 64, 160, 112),
    "count": Task(count, 0.7, 64, 192, 128),
    "context": Task(context, 0.7, 320, 64, 160),
}


def solve(problem: Problem, hasty: Iterable[bool]) -> str:
    """The worked answer, with its leading space; each part with care, every sum written, or in haste."""
    total, text = 0, problem.begin
    for part, jumps in zip(problem.parts, hasty, strict=True):
        if jumps:
            total += sum(part)
            text += f" ={total};"
            continue
        for number in part:
            text += f" {total}+{number}={total + number}"
            total += number
        text += ";"
    return f"{text} \\boxed{{{total}}}"


def write_data(task: Task, folder: Path, seed: int, train: int, held_out: int) -> None:
    """Write train, eval, hard and sft (.jsonl). The same arguments give the same bytes; no problem comes twice."""
    rng = random.Random(seed)
    known: dict[str, Problem] = {}
    while len(known) < train + held_out:
        problem = task.draw(rng, False)
        known.setdefault(problem.prompt, problem)
    problems = list(known.values())
    learned, unseen = problems[:train], problems[train:]
    hard = [task.draw(rng, True) for _ in range(held_out)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", learned), ("eval", unseen), ("hard", hard)):
        _write(folder / f"{name}.jsonl", ({"prompt": p.prompt, "answer": str(p.answer)} for p in chosen))
    texts = ({"prompt": p.prompt, "solution": solve(p, (rng.random() < task.haste for _ in p.parts))} for p in learned)
    _write(folder / "sft.jsonl", texts)


def _write(file: Path, rows: Iterable[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is there already is not made again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=0.2, help="held-out accuracy at which the warm-up stops")
    parser.add_argument("--steps", type=int, default=1500, help="of the warm-up, at most")
    arguments = parser.parse_args()
    task, out = TASKS[arguments.task], arguments.out
    if (out / "model" / "config.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    data, tokenizer = out / "data", out / "tokenizer"
    write_data(task, data, arguments.seed, train=6000, held_out=512)
    corpus = ["--corpus", data / "sft.jsonl", "--out", tokenizer, "--vocab-size", str(task.vocab)]
    subprocess.run([sys.executable, QUICKSTART / "make_tokenizer.py", *corpus], check=True)
    make_model = [sys.executable, QUICKSTART / "make_model.py", "--tokenizer", tokenizer, "--out", out / "start"]
    subprocess.run([*make_model, f"--seed={arguments.seed}"], check=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = [
        f"run.dir={out / 'warmup'}",
        f"run.seed={arguments.seed}",
        f"model.path={out / 'start'}",
        f"data.train={data / 'sft.jsonl'}",
        f"data.eval.problems.path={data / 'eval.jsonl'}",
        f"data.max_prompt_tokens={task.prompt_tokens}",
        f"rollout.tree.segment_tokens={task.response_tokens}",
        f"trainer.stop_at_accuracy={arguments.until}",
        f"trainer.steps={arguments.steps}",
    ]
    command = [*launcher, "-m", "treepo_mcore", "sft", QUICKSTART / "warmup.yaml", *settings]
    subprocess.run(command, check=True)
    (out / "warmup" / "policy").rename(out / "model")


if __name__ == "__main__":
    main()
