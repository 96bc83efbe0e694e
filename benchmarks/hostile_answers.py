"""Answers that were made to hang, fill or break a grader, through the real reward pool: does it come through, how fast?

    python benchmarks/hostile_answers.py [--answers 10000] [--out FILE]

Half of the answers are ordinary ones. The rest are of hostile kinds, in a random order, against answers of usual
forms. Each kind's row: how many, how many failed (beyond reward.timeout, or the worker died), how many were taken for
right, which none may be. The pool has one worker, the limits of the defaults but for a second a call, and 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

from treepo_mcore.config import RewardConfig
from treepo_mcore.rewards.pool import RewardPool

GOLD = ("7", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\{1,2,3\}", "[0,1)")
BOX = "\\boxed{%s}"


def nested(command: str, depth: int) -> str:
    """A command within itself."""
    return f"\\{command}{{" * depth + "1" + "}" * depth


HOSTILE: dict[str, Callable[[random.Random], str]] = {
    "a megabyte of braces": lambda rng: BOX % ("{" * 500_000 + "}" * 500_000),
    "braces that never close": lambda rng: "\\boxed{" + "{" * rng.randint(1_000, 200_000),
    "a thousand boxes in each other": lambda rng: "\\boxed{" * 1_000 + "8" + "}" * 1_000,
    "nested fractions": lambda rng: BOX % nested("frac{1}", rng.randint(50, 2_000)),
    "nested roots": lambda rng: BOX % nested("sqrt", rng.randint(50, 2_000)),
    "towers of powers": lambda rng: BOX % "^".join(["9"] * rng.randint(4, 50)),
    "powers in braces": lambda rng: BOX % "9^{9^{9^{9}}}",
    "factorials": lambda rng: BOX % ("99999" + "!" * rng.randint(1, 9)),
    "a number of many digits": lambda rng: BOX % ("8" * rng.randint(5_000, 200_000)),
    "a sum of many terms": lambda rng: BOX % "+".join(f"x_{{{i}}}" for i in range(rng.randint(500, 3_000))),
    "sets of many members": lambda rng: BOX % ("\\{" + ",".join(map(str, range(rng.randint(1_000, 20_000)))) + "\\}"),
    "a product that expands": lambda rng: BOX % ("(a+b+c)^{" + str(rng.randint(50, 5_000)) + "}"),
    "large matrices": lambda rng: (
        BOX % ("\\begin{pmatrix}" + "\\\\".join("&".join(["x"] * 40) for _ in range(40)) + "\\end{pmatrix}")
    ),
    "combining characters": lambda rng: BOX % ("8" + "\u0301" * rng.randint(1_000, 100_000)),
    "text from right to left": lambda rng: BOX % ("\u202e" * 1_000 + "8"),
    "half of surrogate pairs": lambda rng: BOX % ("\ud83d" * 1_000),
    "zeros and control characters": lambda rng: BOX % ("\x00\x1b[2J\x07" * 1_000),
    "python": lambda rng: BOX % '__import__("os").system("sleep 60")',
    "integrals and limits": lambda rng: BOX % ("\\int_0^{1}" * rng.randint(10, 300) + "x dx"),
}


def measure(answers: int, seed: int = 0) -> dict[str, Any]:
    """Submit them all, as an engine would, and wait for the last."""
    rng = random.Random(seed)
    kinds = [rng.choice(list(HOSTILE)) if number % 2 else "ordinary" for number in range(answers)]
    texts = [HOSTILE[kind](rng) if kind in HOSTILE else BOX % rng.randint(10, 99) for kind in kinds]
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("ordinary", *HOSTILE)}
    begin, longest, last = time.perf_counter(), 0.0, time.perf_counter()
    with RewardPool(RewardConfig(timeout=1.0, memory_gib=1.0)) as pool:
        for key, text in enumerate(texts):
            pool.submit(key, text, rng.choice(GOLD), "", {})
        left = answers
        while left:
            for result in pool.poll():
                left -= 1
                found[kinds[result.key]].update(
                    answers=1, failed=int(result.error is not None), right=int(result.correct)
                )
                longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
            if time.perf_counter() - last > 60:
                raise RuntimeError(f"the pool hangs with {left} answers left")
            time.sleep(0.001)
        counts = pool.metrics()
    seconds = time.perf_counter() - begin
    return {
        "machine": machine(),
        "answers": answers,
        "seconds": round(seconds, 1),
        "answers_per_second": round(answers / seconds, 1),
        "longest_silence": round(longest, 2),
        "pool": counts,
        "kinds": {kind: dict(counted) for kind, counted in found.items()},
    }


def main() -> None:
    """Print the table; write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.answers)
    for kind, counted in result["kinds"].items():
        print(
            f"{kind:32} {counted.get('answers', 0):6}, {counted.get('failed', 0)} failed, "
            f"{counted.get('right', 0)} right"
        )
    print({name: result[name] for name in ("answers", "seconds", "answers_per_second", "longest_silence", "pool")})
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
