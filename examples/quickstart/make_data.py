"""Worded arithmetic with worked solutions: prompts a model of a few million parameters can learn on a laptop.

    python examples/quickstart/make_data.py --out data/quickstart

writes `train.jsonl` (prompt, answer, solution), `eval.jsonl` (prompt, answer) and `sft.jsonl` (prompt, solution,
style). No two problems of the three, train and eval together, are the same sum in other words: each has its own
arithmetic expression. `sft.jsonl` plays the text a base model has read. It works the training problems in three styles:
two that write every step, and one that jumps to the answer, which a small model can copy but not compute. Half of the
kinds of problems are mostly answered in that hasty style. So there is something for reinforcement learning to find:
answers that take steps are right more often, also where the text the model grew up on did not take them.

A prompt ends with "Answer:" and a solution begins with a space, so tokens of the two never merge across the border.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NAMES = ("Tom", "Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia")
THINGS = ("marbles", "stamps", "cards", "shells", "apples", "coins", "beads", "books", "pens", "cups")

LARGEST = 49  # no intermediate result is larger

Style = Literal["plain", "told", "hasty"]
Expression = tuple[tuple[int, tuple[int, ...]], ...]  # sorted signed products, e.g. 14 + 3 * 12


@dataclass(frozen=True)
class Template:
    """One kind of problem: its text, its steps over the numbers `a`, `b`, ... and earlier results, the ranges."""

    text: str
    steps: tuple[str, ...]  # "x=a+b": one letter each; the last one is the answer
    ranges: dict[str, tuple[int, int]]  # inclusive
    hasty: float  # share of this kind that sft.jsonl answers without steps


@dataclass(frozen=True)
class Problem:
    prompt: str
    steps: tuple[str, ...]  # "14+23=37"
    answer: int
    expression: Expression
    hasty: float


TEMPLATES = (
    Template(
        "{n} has {a} red and {b} blue {t} and buys {c} bags of {d}. How many {t} are there?",
        ("x=a+b", "y=c*d", "z=x+y"),
        {"a": (2, 12), "b": (2, 12), "c": (2, 4), "d": (2, 6)},
        0.7,
    ),
    Template(
        "{n} has {a} {t}, gives {b} to {m} and finds {c} more. How many {t} are there?",
        ("x=a-b", "y=x+c"),
        {"a": (10, 30), "b": (2, 12), "c": (2, 12)},
        0.1,
    ),
    Template(
        "{n} packs {a} boxes of {b} {t} and {m} packs {c} boxes of {d}. How many {t} are there?",
        ("x=a*b", "y=c*d", "z=x+y"),
        {"a": (2, 5), "b": (2, 6), "c": (2, 5), "d": (2, 6)},
        0.1,
    ),
    Template(
        "{n} buys {a} boxes of {b} {t} and {c} more, and gives {d} to {m}. How many {t} are left?",
        ("x=a*b", "y=x+c", "z=y-d"),
        {"a": (2, 5), "b": (2, 6), "c": (2, 12), "d": (2, 12)},
        0.7,
    ),
    Template(
        "{n} has {a} {t} and {m} has {b} more than {n}. How many {t} are there?",
        ("x=a+b", "y=a+x"),
        {"a": (2, 16), "b": (2, 12)},
        0.1,
    ),
    Template(
        "{n} finds {a} {t} on Monday and {b} on Friday, and loses {c}. How many {t} are left?",
        ("x=a+b", "y=x-c"),
        {"a": (2, 16), "b": (2, 16), "c": (2, 12)},
        0.7,
    ),
    Template(
        "{n} has {a} {t} and sells {b}. Then {c} friends give {d} each. How many {t} are there?",
        ("x=a-b", "y=c*d", "z=x+y"),
        {"a": (10, 30), "b": (2, 12), "c": (2, 4), "d": (2, 6)},
        0.7,
    ),
    Template(
        "{n} and {m} have {a} {t} each. {n} buys {b} more and {m} loses {c}. How many {t} are there?",
        ("x=a+b", "y=a-c", "z=x+y"),
        {"a": (6, 18), "b": (2, 12), "c": (2, 12)},
        0.1,
    ),
)


def make_problems(rng: random.Random, count: int) -> list[Problem]:
    """`count` problems, no two with the same arithmetic expression."""
    problems: dict[Expression, Problem] = {}
    while len(problems) < count:
        problem = _draw(rng)
        if problem is not None:
            problems.setdefault(problem.expression, problem)
    return list(problems.values())


def solve(problem: Problem, style: Style) -> str:
    """The worked solution, with its leading space: every step in one of two phrasings, or the answer alone."""
    box = f"\\boxed{{{problem.answer}}}"
    if style == "plain":
        return f" {'. '.join(problem.steps)}. {box}"
    if style == "told":
        return f" First {', then '.join(problem.steps)}. So the answer is {box}"
    return f" The answer is {box}"


def write_data(out: str | Path, seed: int = 0, train_size: int = 6000, eval_size: int = 512) -> None:
    """Write `train.jsonl`, `eval.jsonl` and `sft.jsonl` under `out`; the same arguments give the same bytes.

    Sizes are in problems; `sft.jsonl` works each training problem once, half of the careful ones "plain", half "told".
    """
    rng = random.Random(seed)
    problems = make_problems(rng, train_size + eval_size)
    rng.shuffle(problems)  # small kinds run out of new expressions early
    learned, held_out = problems[:train_size], problems[train_size:]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder / "train.jsonl",
        ({"prompt": p.prompt, "answer": str(p.answer), "solution": solve(p, "plain")} for p in learned),
    )
    _write(folder / "eval.jsonl", ({"prompt": p.prompt, "answer": str(p.answer)} for p in held_out))
    _write(folder / "sft.jsonl", (_sft_row(p, _style(rng, p.hasty)) for p in learned))


def _draw(rng: random.Random) -> Problem | None:
    template = rng.choice(TEMPLATES)
    numbers = {letter: rng.randint(*bounds) for letter, bounds in template.ranges.items()}
    values = dict(numbers)
    terms: dict[str, Expression] = {letter: ((1, (number,)),) for letter, number in numbers.items()}
    steps = []
    for step in template.steps:
        result, left, sign, right = step[0], step[2], step[3], step[4]
        value = _apply(values[left], sign, values[right])
        if not 1 <= value <= LARGEST:
            return None
        steps.append(f"{values[left]}{sign}{values[right]}={value}")
        values[result] = value
        terms[result] = _expand(terms[left], sign, terms[right])
    name, other = rng.sample(NAMES, 2)
    text = template.text.format(n=name, m=other, t=rng.choice(THINGS), **numbers)
    return Problem(f"{text}\nAnswer:", tuple(steps), value, terms[result], template.hasty)


def _apply(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _expand(left: Expression, sign: str, right: Expression) -> Expression:
    """Sum of products in a fixed order, so that 3*12+14 and 14+12*3 are the same expression."""
    if sign == "*":
        products = [(s * t, tuple(sorted(f + g))) for s, f in left for t, g in right]
        return tuple(sorted(products))
    flip = -1 if sign == "-" else 1
    return tuple(sorted([*left, *((flip * s, f) for s, f in right)]))


def _style(rng: random.Random, hasty: float) -> Style:
    if rng.random() < hasty:
        return "hasty"
    return "plain" if rng.random() < 0.5 else "told"


def _sft_row(problem: Problem, style: Style) -> dict[str, str]:
    return {"prompt": problem.prompt, "solution": solve(problem, style), "style": style}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write worded arithmetic problems and worked solutions.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, eval.jsonl and sft.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=6000, help="training problems")
    parser.add_argument("--eval", type=int, default=512, help="held-out problems")
    arguments = parser.parse_args()
    write_data(arguments.out, arguments.seed, arguments.train, arguments.eval)


if __name__ == "__main__":
    main()
