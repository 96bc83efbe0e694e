"""benchmarks/gpu: the door, files that go on where they stopped, tables, and what of the measuring a CPU can do."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from treepo_mcore.config import parse_config
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.memory import plan_memory
from treepo_mcore.system.environment import has_gpu
from treepo_mcore.weights.layout import hf_shapes

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}


def load(name):
    """A script as a module, under a name of its own."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


common, training, whole = load("common"), load("training"), load("whole")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["rollout", "training", "whole"])
def test_without_a_gpu_one_line_and_status_3(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [f"{FOLDER / name}.py: no NVIDIA GPU on this machine; nothing was measured"]
    assert list(tmp_path.iterdir()) == []


MACHINE = {"device": "H100", "torch": "2.11.0"}


def test_a_file_goes_on_where_it_stopped(tmp_path):
    file, measured = tmp_path / "gpu.json", []

    def launch(name, seconds):
        measured.append((name, seconds))
        if name == "b" and len(measured) == 2:
            raise subprocess.TimeoutExpired("cell", seconds)
        return {"tokens": 1.5}

    now = iter([0, 1, 2, 100, 101, 170, 171, 181])
    left = common.run_cells(dict.fromkeys("abcd"), common.Results(file, MACHINE), 5, launch, lambda: next(now))
    assert left == ["b", "d"]  # b ran out of time, d would have had less than two minutes
    assert json.loads(file.read_text()) == {
        "machine": MACHINE,
        "cells": {"a": {"tokens": 1.5}, "c": {"tokens": 1.5}},
    }
    again = common.Results(file, MACHINE)
    assert common.run_cells(dict.fromkeys("abcd"), again, 5, launch) == []
    assert [name for name, _ in measured] == ["a", "b", "c", "b", "d"]
    assert set(common.Results(file, MACHINE, fresh=True).cells) == set()


@pytest.mark.long
def test_a_cell_that_runs_too_long_ends_with_all_that_it_started(tmp_path):
    """What it started gets the time to end its own workers, as torchrun must; these have sessions of their own."""
    worker = "import time; time.sleep(600)"
    launcher = f"""
import pathlib, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {worker!r}], start_new_session=True)
def end(number, frame):
    time.sleep(0.5)
    worker.terminate()
    worker.wait()
    pathlib.Path({str(tmp_path / "ended")!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(600)
"""
    cell = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {launcher!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        common.run_to_the_end([sys.executable, "-c", cell], 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ended", "started"]


def test_a_cell_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        common.run_to_the_end([sys.executable, "-c", "raise SystemExit(3)"], 60)


def test_results_of_another_machine_are_not_mixed(tmp_path):
    file = tmp_path / "gpu.json"
    common.Results(file, MACHINE).add("a", {})
    with pytest.raises(SystemExit, match="measured with another device"):
        common.Results(file, MACHINE | {"device": "H200"})


def test_table_lists_numbers_and_leaves_the_rest():
    text = common.table({"a": {"x": 1.0, "all": [1, 2]}, "bb": {"y": 12345.6, "x": None}})
    assert [line.split() for line in text.splitlines()] == [["x", "y"], ["a", "1", "-"], ["bb", "-", "1.235e+04"]]


def test_models_are_of_families_that_we_know(tmp_path):
    for model in common.MODELS:
        directory = common.write_model(tmp_path / model, model, layers=2)
        assert whole.architecture(directory).layers == 2
    dense = whole.architecture(common.write_model(tmp_path / "70", "70b-layers", layers=80))
    assert training.layer_parameters(dense) == 855_638_016


def test_layers_of_70b_that_fit_by_the_planners_numbers(tmp_path):
    arch = whole.architecture(common.write_model(tmp_path, "70b-layers", layers=1))
    layers = {}
    for name in ("h100", "h200"):
        gpu = make_cluster(name, "ib400", 1, 1).gpu
        layers[name] = training.how_many_layers(arch, gpu.memory, gpu.capability)
        for number, fits in ((layers[name], True), (layers[name] + 1, False)):
            directory = common.write_model(tmp_path / name, "70b-layers", layers=number)
            settings = parse_config(training.configuration("blockwise", directory))
            cluster = make_cluster(name, "ib400", 1, 1)
            planned = plan_memory(settings, whole.architecture(directory), cluster, training.BUDGET)
            assert (planned.total("update") <= training.FILLED * gpu.memory) == fits
    assert layers == {"h100": 3, "h200": 5}


def test_flops_count_what_a_token_sees(tmp_path):
    arch = whole.architecture(common.write_model(tmp_path, "70b-layers", **SMALL))
    packed = training.benchmark("cpu_training")
    case = packed.Case(factor=2, prompt=4, answer=8, segment=4, width=4)
    from treepo_mcore.config import AdvantageConfig
    from treepo_mcore.learn.advantage import advantages
    from treepo_mcore.learn.packing import pack_flat

    tree = packed.generate(case, 0)
    flat = pack_flat([tree], advantages([tree], AdvantageConfig()), 10**6)
    lengths = [4 + tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))]
    per_token = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    seen = sum(n * (n + 1) // 2 for n in lengths)
    assert training.flops(flat, arch) == 2 * (per_token * sum(lengths) + 4 * 128 * seen)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_pushed_shards_fill_every_parameter(shards, tmp_path, group):
    """On a CPU: the same plan, with nothing about its speed."""
    arch = whole.architecture(common.write_model(tmp_path, "70b-layers", **SMALL))
    pieces, _ = whole.shards_on(arch, shards, "cpu")
    covered = dict.fromkeys(hf_shapes(arch), 0)
    for piece in pieces:
        covered[piece.tensor] += piece.numel
    assert covered == {name: torch.Size(shape).numel() for name, shape in hf_shapes(arch).items()}
    whole.REPEATS = 1
    for fp8 in (False, True):
        row = whole.push(arch, shards, "cpu", fp8)
        assert row["push_over_floor"] > 0
        assert row["gigabytes"] * 1e9 == pytest.approx(2 * sum(covered.values()))


def test_phases_are_medians_behind_the_first_step():
    rows = [{"time/push": value, "memory/train_gib": 1.0, "reward/mean": 0.0} for value in (100.0, 1.0, 2.0, 3.0)]
    assert whole.by_phase(rows) == {"time/push": 2.0, "memory/train_gib": 1.0}
