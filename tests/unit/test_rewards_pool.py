"""The reward pool: results, failures contained, nothing lost. Functions are written to a module the workers import."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_mcore.config import ConfigError, RewardConfig
from treepo_mcore.rewards.pool import RewardPool

FUNCTIONS = """
import os, signal, sys, time

def score(response, answer, prompt, row):
    if response == "raise":
        raise KeyError("nothing here")
    if response == "hang":
        time.sleep(60)
    if response == "hang without alarm":
        signal.alarm(0)
        time.sleep(60)
    if response == "huge":
        return 9 ** 9 ** 9
    if response == "die":
        os._exit(3)
    if response == "exit":
        sys.exit(4)
    if response == "nan":
        return float("nan")
    if response == "none":
        return None
    if response == "modules":
        return float("torch" in sys.modules or "treepo_mcore.config" in sys.modules)
    return float(len(response)) if response == answer else 0

def graded(response, answer, prompt, row):
    return row.pop("weights")[response]["value"]

def starts_a_loop(response, answer, prompt, row):
    import asyncio

    async def later():
        await asyncio.sleep(0)
        return 0.5

    return asyncio.run(later())

def without_row(response, answer, prompt):
    return 1.0

def parts(response, answer, prompt, row):
    return {"score": 0.5, "format": True, "length": 3, "told": "text", "far": float("inf")}

def greedy(response, answer, prompt, row):
    return float(len(bytearray(4 * 2**30)) if response == "big" else 1.0)


constant = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "pool_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "pool_functions:score"
    sys.modules.pop("pool_functions", None)


def run(config, responses, answer="abc"):
    with RewardPool(config) as pool:
        for key, response in enumerate(responses):
            pool.submit(key, response, answer, "prompt", {})
        results = {result.key: result for result in pool.drain()}
        return results, pool.metrics()


def test_scores_of_a_custom_function(functions):
    results, counts = run(RewardConfig(function=functions, workers=2), ["abc", "x"] * 500)
    assert [(results[key].score, results[key].correct) for key in range(2)] == [(3.0, True), (0.0, False)]
    assert sorted(results) == list(range(1000))
    assert counts == {"calls": 1000, "quick": 0, "raised": 0, "timed_out": 0, "died": 0}


def test_a_function_may_start_an_event_loop_of_its_own(functions):
    results, _ = run(RewardConfig(function="pool_functions:starts_a_loop"), ["a", "b"])
    assert [(result.score, result.error) for result in results.values()] == [(0.5, None)] * 2


def test_other_numbers_of_a_mapping_come_along(functions):
    results, _ = run(RewardConfig(function="pool_functions:parts"), ["abc"])
    assert (results[0].score, results[0].components) == (0.5, {"format": 1.0, "length": 3.0})


def test_a_call_that_wants_too_much_memory_fails_alone(functions):
    results, counts = run(RewardConfig(function="pool_functions:greedy", memory_gib=2), ["a", "big", "b"])
    assert [results[key].score for key in range(3)] == [1.0, 0.0, 1.0]
    assert results[1].error.startswith("MemoryError")
    assert (counts["raised"], counts["died"]) == (1, 0)


def test_the_row_reaches_a_custom_function_and_is_its_own(functions):
    """Calls of a batch belong to one prompt and share its row: the function takes it apart every time."""
    row = {"weights": {"a": {"value": 0.25}, "b": {"value": -1.5}}, "data_source": "gsm8k"}
    with RewardPool(RewardConfig(function="pool_functions:graded")) as pool:
        for key in range(100):
            pool.submit(key, "ab"[key % 2], "", "", row)
        results = {result.key: result for result in pool.drain()}
        assert pool.metrics()["raised"] == 0
    assert [(results[key].score, results[key].correct) for key in (98, 99)] == [(0.25, True), (-1.5, False)]
    assert len(row) == 2


def test_math_is_not_sent_rows():
    with RewardPool(RewardConfig()) as pool:
        pool.submit(0, r"\boxed{\frac{1}{2}}", "0.5", "", {"cannot be pickled": lambda: None})
        assert pool.drain()[0].correct


def test_of_calls_that_fail_alike_one_is_told(functions, caplog):
    run(RewardConfig(function=functions), ["raise", "raise", "abc"])
    assert [record.getMessage() for record in caplog.records] == [
        "reward.function pool_functions:score: a call raised, see reward.failed: KeyError: 'nothing here'"
    ]


def test_failures_cost_only_themselves(functions):
    bad = ["raise", "hang", "die", "nan", "exit", "none", "huge"]
    responses = [response for failing in bad for response in ("abc", failing, "abc")]
    results, counts = run(RewardConfig(function=functions, timeout=0.5), responses)
    failed = {responses[key]: result for key, result in results.items() if result.error is not None}
    assert {response: result.error for response, result in failed.items()} == {
        "raise": "KeyError: 'nothing here'",
        "hang": "timed out after 0.5 s",
        "die": "worker died with exit code 3",
        "nan": "returned nan",
        "exit": "SystemExit: 4",
        "none": "TypeError: float() argument must be a string or a real number, not 'NoneType'",
        "huge": "timed out after 0.5 s",
    }
    assert all(not result.correct and result.score == 0.0 for result in failed.values())
    assert sum(result.correct for result in results.values()) == 2 * len(bad)
    assert counts == {"calls": 21, "quick": 0, "raised": 4, "timed_out": 2, "died": 1}


def test_a_function_that_stops_the_alarm_is_killed(functions):
    results, counts = run(RewardConfig(function=functions, timeout=0.2), ["hang without alarm", "abc"])
    assert results[0].error == "timed out after 0.2 s"
    assert results[1].correct
    assert counts["timed_out"] == 1


def test_poll_does_not_wait(functions):
    with RewardPool(RewardConfig(function=functions, timeout=5.0)) as pool:
        pool.submit("slow", "hang", "abc", "", {})
        start = time.monotonic()
        while time.monotonic() - start < 1.0:  # long enough for the worker to start and take the call
            before = time.monotonic()
            assert pool.poll() == []
            assert time.monotonic() - before < 0.5
            time.sleep(0.05)


def test_a_worker_killed_from_outside_is_replaced(functions):
    with RewardPool(RewardConfig(function=functions)) as pool:
        pool.submit(0, "abc", "abc", "", {})
        assert pool.drain()[0].correct
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        pool.submit(1, "abc", "abc", "", {})
        assert [(result.key, result.correct) for result in pool.drain()] == [(1, True)]


def test_signals_that_ask_the_rank_to_stop_do_not_hurt_workers(functions):
    with RewardPool(RewardConfig(function=functions)) as pool:
        worker = pool._workers[0].process
        for number in (signal.SIGUSR1, signal.SIGTERM):
            worker.send_signal(number)
        pool.submit(0, "abc", "abc", "", {})
        assert pool.drain()[0].score == 3.0
        assert pool._workers[0].process is worker
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_do_not_import_torch(functions):
    results, _ = run(RewardConfig(function=functions), ["modules"])
    assert results[0].error is None
    assert results[0].score == 0.0


def test_math_decides_strings_without_a_worker():
    with RewardPool(RewardConfig()) as pool:
        for key, text in enumerate([r"\boxed{7}", r"\boxed{8}", "no box"]):
            pool.submit(key, text, "7", "", {})
        assert [(result.key, result.correct) for result in pool.poll()] == [(0, True), (1, False), (2, False)]
        assert pool.metrics()["quick"] == 3


def test_math_sends_the_rest_to_a_worker():
    results, counts = run(RewardConfig(), [r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", r"\boxed{0.5}"], "0.5")
    assert [results[key].score for key in range(3)] == [1.0, 0.0, 1.0]
    assert counts["quick"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "reward.function: expected math, exact, choice, numeric, format, code, judge or package.module:name"),
        ("no_such_module_here:f", "reward.function: cannot import 'no_such_module_here:f': ModuleNotFoundError"),
        ("pool_functions:missing", "reward.function: cannot import 'pool_functions:missing': AttributeError"),
        ("pool_functions:constant", "reward.function: 'pool_functions:constant' is not callable"),
        (
            "pool_functions:without_row",
            "reward.function: expected f(response, answer, prompt, row) or verl's (data_source, solution_str, "
            "ground_truth, extra_info), found pool_functions:without_row(response, answer, prompt)",
        ),
    ],
)
def test_unknown_function(functions, name, message):
    with pytest.raises(ConfigError) as error:
        RewardPool(RewardConfig(function=name))
    assert str(error.value).startswith(message)


def test_a_worker_that_cannot_start_is_an_error(functions, tmp_path):
    with RewardPool(RewardConfig(function=functions)) as pool:
        pool.drain()
    (tmp_path / "pool_functions.py").write_text("raise RuntimeError('only fails in workers')")  # the parent has it
    with RewardPool(RewardConfig(function=functions)) as pool:
        pool.submit(0, "abc", "abc", "", {})
        with pytest.raises(RuntimeError, match=r"could not start: .*RuntimeError: only fails in workers"):
            pool.drain()


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from treepo_mcore.config import RewardConfig\n"
        "from treepo_mcore.rewards.pool import RewardPool\n"
        "with RewardPool(RewardConfig()) as pool:\n"
        "    pool.submit(0, r'\\boxed{\\frac{1}{2}}', '0.5', '', {})\n"
        "    print(pool.drain()[0].correct)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=30)
    assert done.stdout == "True\n", done.stderr


OTHERS = """
import asyncio, os, subprocess

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info) == ("gsm8k", {"level": 3})
    return {"score": float(ground_truth in solution_str), "acc": True}

async def judge(response, answer, prompt, row):
    await asyncio.sleep(0.01)
    return 2.0

def swapped(prompt, response, answer, row):
    return float(answer in response)

def secrets(response, answer, prompt, row):
    gone = {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"}
    return float(not gone & set(os.environ) and "TOKENIZERS_PARALLELISM" in os.environ)

def starts_a_program(response, answer, prompt, row):
    child = subprocess.Popen(["sleep", "300"])
    open(row["file"], "w").write(str(child.pid))
    child.wait()

def positions(a, b, c, d):
    return 1.0
"""


@pytest.fixture
def others(tmp_path, monkeypatch):
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("name", "score"), [("compute_score", 1.0), ("judge", 2.0), ("swapped", 1.0)])
def test_functions_are_called_by_the_names_of_their_parameters(others, name, score):
    row = {"data_source": "gsm8k", "extra_info": {"level": 3}}
    with RewardPool(RewardConfig(function=f"others:{name}")) as pool:
        pool.submit(0, "it is 42", "42", "a question", row)
        (result,) = pool.drain()
    assert (result.score, result.error) == (score, None)


def test_other_names_are_refused_with_the_wrapper_to_write(others):
    with pytest.raises(ConfigError, match=r"others:positions\(a, b, c, d\); write a wrapper, .* return positions"):
        RewardPool(RewardConfig(function="others:positions"))


def test_a_worker_has_no_tokens_of_services(others, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with RewardPool(RewardConfig(function="others:secrets")) as pool:
        pool.submit(0, "", "", "", {})
        assert pool.drain()[0].score == 1.0


def test_what_a_function_starts_ends_with_its_worker(others, tmp_path):
    with RewardPool(RewardConfig(function="others:starts_a_program", timeout=0.5)) as pool:
        pool.submit(0, "", "", "", {"file": str(tmp_path / "pid")})
        assert "timed out" in pool.drain()[0].error
    child = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while child.is_dir() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "the program runs on"
        time.sleep(0.05)
