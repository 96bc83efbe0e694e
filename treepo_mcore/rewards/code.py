"""Rewards of programs: the last block of code in a response, run against tests in a process of its own.

The process has a session, a folder, limits of time, memory, files and processes of its own, no variables of the
environment, and, where the system lets an ordinary user have namespaces, no network and no process that it could signal
or that outlives it. That keeps honest mistakes and idle tricks of a model in their place. It is no security boundary: a
program reads every file that this user can read. Where that matters, run the job in a container of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = re.compile(r"```[ \t]*([A-Za-z0-9_+-]*)[^\n]*\n(.*?)```", re.DOTALL)
_CHILD = Path(__file__).with_name("confined.py")
PYTHON = ("", "python", "python3", "py")  # behind the fence
SECONDS = 4.0
OUTPUT_MIB = 4  # a program may write, to its output or to any one file


class Test(NamedTuple):
    """One program run: text that follows the response's code, its input, and what it has to write (None: anything)."""

    code: str = ""
    input: str = ""
    output: str | None = None


def code(
    response: str, answer: Any, prompt: str, row: dict[str, Any], *, seconds: float = SECONDS, memory_mib: int = 512
) -> dict[str, float]:
    """`score` 1.0 where the program passes all tests, and as `tests` the share that it passes.

    answer: {"inputs": [...], "outputs": [...]}, each pair a test over standard input and output, or, with a "fn_name",
    a call's arguments and what it returns (APPS, TACO, verl's prime_code); Python text that fails by an exception
    (HumanEval), or a list of such texts (MBPP); or JSON text of these.
    seconds: for all tests together; what has not run by then is failed.
    """
    program, tests = last_block(response), tests_of(answer)
    deadline = time.monotonic() + seconds
    passed = sum(_passes(program, test, deadline, memory_mib) for test in tests) if program else 0
    return {"score": float(passed == len(tests)), "tests": passed / len(tests)}


def isolates() -> bool:
    """Whether programs have no network here, and end together with the first one."""
    return _passes("import os\nassert os.getpid() == 1", Test(), time.monotonic() + 10, 512)


def last_block(response: str) -> str:
    """Code of the last closed fence that is Python's or of no language; empty without one."""
    blocks = [text for language, text in _BLOCK.findall(response) if language.lower() in PYTHON]
    return blocks[-1] if blocks else ""


def tests_of(answer: Any) -> list[Test]:
    """Raises ValueError where the answer has no test that could fail."""
    if isinstance(answer, str):
        with contextlib.suppress(ValueError):  # Python text is no JSON
            answer = json.loads(answer)
    if isinstance(answer, dict) and answer.keys() >= {"inputs", "outputs"}:
        pairs = list(zip(answer["inputs"], answer["outputs"], strict=True))
        name = answer.get("fn_name")
        tests = [_call(name, *pair) if name else Test("", _text(pair[0]), _text(pair[1])) for pair in pairs]
    elif isinstance(answer, str | list):
        tests = [Test(str(text)) for text in ([answer] if isinstance(answer, str) else answer)]
    else:
        raise ValueError(f"expected inputs and outputs, Python text or a list of it, found {str(answer)[:80]}")
    if not tests or not all(test.code.strip() or test.output is not None for test in tests):
        raise ValueError(f"expected one test at least, found {str(answer)[:80]}")
    return tests


def _call(name: str, arguments: Any, expected: Any) -> Test:
    """Sets of tests have the returned value as it is or in a list of one."""
    one = expected[0] if isinstance(expected, list) and len(expected) == 1 else expected
    values = json.dumps([arguments, expected, one])
    return Test(
        "\nimport json as _json\n"
        f"_arguments, *_expected = _json.loads({values!r})\n"
        f"_found = _json.loads(_json.dumps((Solution().{name} if 'Solution' in globals() else {name})(*_arguments)))\n"
        "assert _found in _expected, _found\n"
    )


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _passes(program: str, test: Test, deadline: float, memory_mib: int) -> bool:
    """Whether the program ends well and in time, and has written what it should."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "program.py")
        file.write_text(program + "\n" + test.code, errors="replace")
        limits = [str(memory_mib * 2**20), str(OUTPUT_MIB * 2**20), str(int(left) + 1)]
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
            given.write(test.input.encode(errors="replace"))
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD), *limits, str(file)],
                stdin=given,
                stdout=written,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            try:
                status = process.wait(left)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # what the program started may run on
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            written.seek(0)
            output = written.read().decode(errors="replace")
    return status == 0 and (test.output is None or _lines(output) == _lines(test.output))


def _lines(text: str) -> list[str]:
    """White space at the ends of lines and of the whole does not count."""
    return [line.rstrip() for line in text.strip().splitlines()]
