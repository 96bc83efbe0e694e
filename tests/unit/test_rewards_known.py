"""The reward functions that come with the package, alone and together, through the real worker processes."""

import contextlib
import errno
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from treepo_mcore.config import ConfigError, RewardConfig
from treepo_mcore.rewards.check import check_function
from treepo_mcore.rewards.code import code, isolates, last_block
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rewards.shaping import shape
from treepo_mcore.rewards.short import choice, exact, found_answer, numeric


def results(config, calls):
    """`calls`: pairs of response and answer; their results in the same order."""
    with RewardPool(RewardConfig(**config)) as pool:
        for key, (response, answer) in enumerate(calls):
            pool.submit(key, response, answer, "prompt", {})
        return sorted(pool.drain(), key=lambda result: result.key)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"so \boxed{4}, not \boxed{ 5 }", "5"),
        ("<think>4</think><answer>\n5 </answer>", "5"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("The answer is: 5\n", "5"),
        ("Answer: 5 apples\nbye", "5 apples"),
        ("first\n 5 \n\n", "5"),
        ("", ""),
    ],
)
def test_where_an_answer_is_looked_for(response, found):
    assert found_answer(response, "") == found
    assert found_answer("x = 7; x = 8", r"x = (\d)") == "8"
    assert found_answer("nothing", r"x = (\d)") == ""


@pytest.mark.parametrize(
    ("function", "response", "answer", "options", "right"),
    [
        (exact, "it is\nthe  cat", "the cat", {}, True),
        (exact, "The cat", "the cat", {}, False),
        (exact, "The cat", "the cat", {"ignore_case": True}, True),
        (exact, "the cat sat", "the cat", {}, False),
        (choice, "The answer is (B).", "B", {}, True),
        (choice, "**B.** because", "b", {}, True),
        (choice, r"\boxed{B}", "1", {}, True),
        (choice, "Because it is", "B", {}, False),
        (choice, "C", "B", {}, False),
        (choice, "E", "E", {"letters": "ABCDE"}, True),
        (numeric, r"\boxed{1,234.50}", "1234.5", {}, True),
        (numeric, "about 3.14 km", "3.14159", {"relative": 1e-3}, True),
        (numeric, "about 3.14 km", "3.14159", {}, False),
        (numeric, r"\boxed{\frac{1}{2}}", "0.5", {}, True),
        (numeric, "$-7", "-7", {}, True),
        (numeric, "50%", "50", {}, True),
        (numeric, "1e-3", "0.001", {}, True),
        (numeric, "0.04", "0", {"absolute": 0.05}, True),
        (numeric, "no idea", "0", {}, False),
        (numeric, "1/0", "1", {}, False),
    ],
)
def test_short_answers(function, response, answer, options, right):
    assert function(response, answer, "", {}, **options) == float(right)


@pytest.mark.parametrize(("function", "answer"), [(choice, "K"), (choice, "both"), (numeric, "many")])
def test_a_reference_that_cannot_be_met_is_an_error_of_its_call(function, answer):
    with pytest.raises(ValueError, match=r"expected (one of the letters|a number)"):
        function("x", answer, "", {})


def program(text):
    return f"I think so.\n```python\n{text}\n```\nDone."


DOUBLE = program("print(2 * int(input()))")
TWICE = {"inputs": ["1\n", "4\n"], "outputs": ["2\n", "8"]}


@pytest.mark.parametrize(
    ("response", "answer", "share"),
    [
        (DOUBLE, TWICE, 1.0),
        (DOUBLE, json.dumps(TWICE), 1.0),
        (program("print(2)"), TWICE, 0.5),
        ("print(2)", TWICE, 0.0),  # no block
        (
            program("def f(x): return [x, x]"),
            {"inputs": [[3], ["a"]], "outputs": [[[3, 3]], ["a", "a"]], "fn_name": "f"},
            1,
        ),
        (
            program("class Solution:\n    def f(self, x): return x"),
            {"inputs": [[3]], "outputs": [3], "fn_name": "f"},
            1,
        ),
        (program("def f(x): return x + 1"), ["assert f(1) == 2", "assert f(2) == 4"], 0.5),
        (program("def f(x): return x + 1"), "def check(c):\n    assert c(1) == 2\ncheck(f)", 1.0),
        (program("import os; os._exit(0)"), ["assert False"], 1.0),  # no test can see that; docs/rewards.md says so
        (program("raise SystemExit(3)"), TWICE, 0.0),
        (program("import sys; sys.stdout.write('x' * 2**24)"), TWICE, 0.0),
        (program("x = bytearray(2**31); print(2 * int(input()))"), TWICE, 0.0),
        (
            program("import os; print(len([k for k in os.environ if k not in ('PATH', 'LANG', 'LC_CTYPE')]))"),
            {"inputs": [""], "outputs": ["0"]},
            1,
        ),
    ],
)
def test_programs(response, answer, share):
    assert code(response, answer, "", {}) == {"score": float(share == 1), "tests": share}


def test_a_program_that_hangs_and_forks_costs_its_seconds_and_leaves_nothing():
    forks = program("import os, time\nfor _ in range(4): os.fork()\ntime.sleep(60)")
    begin = time.monotonic()
    assert code(forks, TWICE, "", {}, seconds=1.0)["score"] == 0.0
    assert time.monotonic() - begin < 5
    assert not left_over()


@pytest.mark.skipif(not isolates(), reason="this system lets its user have no namespaces")
def test_where_the_system_has_namespaces_no_network_and_nothing_outlives_the_program():
    connect = "import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept OSError as e: print(e.errno)"
    unreachable = {"inputs": [""], "outputs": [str(errno.ENETUNREACH)]}
    assert code(program(connect), unreachable, "", {})["score"] == 1.0
    flees = program("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(60)\nprint(2)")
    assert code(flees, {"inputs": [""], "outputs": ["2"]}, "", {})["score"] == 1.0
    assert not left_over()


def left_over():
    """Programs that still run."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(entry.read_text())
    return [command for command in commands if "program.py" in command]


def test_the_last_python_block_counts():
    text = "```python\na\n```\n```py\nb\n```\n```json\n{}\n```\n```python\nopen"
    assert last_block(text) == "b\n"


def test_components_are_added_and_told_by_name():
    config = {
        "function": "numeric",
        "components": {
            "form": {"function": "format", "weight": 0.25, "options": {"pattern": "Answer: .*"}},
            "short": {"function": "exact", "weight": -2},
        },
    }
    both, form, none = results(config, [("Answer: 4", "4"), ("Answer: 5", "4"), ("5", "4")])
    assert (both.score, both.correct, both.components, both.added) == (1, True, {"form": 1, "short": 1}, -1.75)
    assert (form.score, form.correct, form.components, form.added) == (0, False, {"form": 1, "short": 0}, 0.25)
    assert (none.score, none.components, none.added) == (0, {"form": 0, "short": 0}, 0)
    settings = RewardConfig(**config)
    assert shape(1.0, 3, 10, settings, added=-1.75) == 1.0 - 1.75
    assert shape(0.0, 3, 10, settings, added=0.25) == -1.0 + 0.25


def test_math_with_a_component_asks_the_workers():
    config = {"components": {"form": {"function": "format", "options": {"pattern": ".*boxed.*"}}}}
    right, wrong = results(config, [(r"\boxed{4}", "4"), ("4", "4")])
    assert (right.correct, right.added) == (True, 1.0)
    assert (wrong.correct, wrong.added) == (False, 0.0)


def test_a_component_that_fails_fails_the_call():
    config = {"function": "exact", "components": {"letter": {"function": "choice"}}}
    (result,) = results(config, [("hello", "hello")])
    assert "expected one of the letters" in result.error
    assert (result.correct, result.added) == (False, 0.0)


class Judge(BaseHTTPRequestHandler):
    """Says what the question in the prompt tells it to; the first call of each question is refused as too busy."""

    seen, together, most = set(), 0, 0
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        with Judge.lock:
            Judge.together += 1
            Judge.most = max(Judge.most, Judge.together)
            first = text not in Judge.seen
            Judge.seen.add(text)
        time.sleep(0.2 if "slow" not in text else 30)
        with Judge.lock:
            Judge.together -= 1
        said = re.search(r"say <(.*?)>", text)
        answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said[1] if said else ""}}]}
        known = self.headers["Authorization"] == "Bearer open"
        self.send_response(429 if first else 200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer | {"id": "1", "object": "chat.completion", "model": "m"}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def judge(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_KEY", "open")
    yield {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "key_variable": "JUDGE_KEY"}
    server.shutdown()


def test_a_judge_is_asked_by_many_calls_at_once_and_again_where_it_is_busy(judge):
    config = {"function": "judge", "options": judge, "concurrency": 8, "timeout": 6.0}
    calls = [(f"say <Score: 0.{n}>", "x") for n in range(8)]
    found = results(config, [*calls, ("say <nothing>", "x")])
    assert [result.score for result in found[:8]] == pytest.approx([n / 10 for n in range(8)])
    assert [result.correct for result in found[:8]] == [False] + [True] * 7
    assert "the judge gave no number" in found[8].error
    assert Judge.most > 4


def test_a_judge_that_does_not_answer_costs_its_own_calls(judge):
    config = {"function": "judge", "options": judge, "concurrency": 4, "timeout": 2.0}
    begin = time.monotonic()
    slow, quick = results(config, [("slow", "x"), ("say <Score: 1>", "x")])
    assert slow.error == "took longer than 2 s"
    assert (quick.error, quick.score) == (None, 1.0)
    assert time.monotonic() - begin < 15


def test_a_prompt_in_a_judges_template_is_not_read_as_one(judge):
    judge["template"] = "{prompt} {answer} {response}"
    config = {"function": "judge", "options": judge, "timeout": 6.0}
    (result,) = results(config, [("say <Score: 0.5> {answer}", "{response}")])
    assert result.score == 0.5
    assert "prompt {response} say <Score: 0.5> {answer}" in Judge.seen


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"function": "nummeric"}, "reward.function: expected math, exact, .* found 'nummeric'; did you mean numeric?"),
        (
            {"function": "exact", "options": {"ignorecase": 1}},
            "reward.options: exact has pattern, ignore_case, found 'ignorecase'; did you mean",
        ),
        ({"function": "numeric", "options": {"relative": "x"}}, "reward.options.relative: .*valid number.*found 'x'"),
        ({"function": "format", "options": {"pattern": "("}}, "reward.options.pattern: expected a regular expression"),
        ({"function": "judge"}, "reward.options: judge needs url, model"),
        (
            {"function": "judge", "options": {"url": "u", "model": "m", "key_variable": "NO_SUCH"}},
            "reward.options.key_variable: there is no variable NO_SUCH in the environment",
        ),
        ({"function": "code"} | {"timeout": 3}, "reward.options.seconds: 4 s for the tests .* ends the call after 3 s"),
        ({"components": {"a": {"function": "fromat"}}}, "reward.components.a.function: expected .* found 'fromat'"),
        ({"options": {"x": 1}}, "reward.options: math has none, found 'x'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config, line):
    with pytest.raises(ConfigError, match=line) as raised:
        check_function(RewardConfig(**config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("weight", ["heavy", float("nan")])
def test_a_weight_is_a_number(weight):
    with pytest.raises(ValueError, match=r"components.a.weight"):
        RewardConfig(components={"a": {"function": "exact", "weight": weight}})
