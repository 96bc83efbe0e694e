"""What the GPU benchmarks share: the door, results that survive an interruption, cells in processes of their own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NO_GPU = 3  # exit status
LEAST = 120  # seconds that a cell needs to build its models: with less it would be ended for nothing
ENDED = 128 + signal.SIGTERM
GRACE = 60  # seconds until what ignores SIGTERM is killed; torchrun gives its workers 30
RESULTS = Path(__file__).parents[1] / "results"

# Sizes as in config.json; weights are random.
MODELS: dict[str, dict[str, Any]] = {
    "1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    # Layers of Llama 3 70B; as few of them as the caller says, and a small vocabulary.
    "70b-layers": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS / f"gpu_{name}.json")
    parser.add_argument("--minutes", type=float, default=6.5, help="no cell runs longer, none begins in the last two")
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--only", help="cells with this in their name")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--cell-out", type=Path, help=argparse.SUPPRESS)
    return parser


def require_gpu(script: str) -> dict[str, Any]:
    """The device and the versions, or one line and exit status 3."""
    from treepo_mcore.system.environment import has_gpu

    if not has_gpu():
        print(f"{script}: no NVIDIA GPU on this machine; nothing was measured")
        sys.exit(NO_GPU)
    import torch

    from treepo_mcore.system.versions import versions

    gpu = torch.cuda.get_device_properties(0)
    return versions() | {"memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}


class Results:
    """A file of cells, written after every one of them."""

    def __init__(self, file: Path, machine: dict[str, Any], fresh: bool = False) -> None:
        """Goes on with what is in the file. Exits where it was measured with something else."""
        self.file, self.machine = file, machine
        self.cells: dict[str, Any] = {}
        if not fresh and file.is_file():
            before = json.loads(file.read_text())
            if before["machine"] != machine:
                differing = [key for key in machine if before["machine"].get(key) != machine[key]]
                sys.exit(
                    f"{file}: measured with another {', '.join(differing)}; --fresh begins anew, --out goes elsewhere"
                )
            self.cells = before["cells"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a cell."""
        self.cells[name] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": self.machine, "cells": self.cells}, indent=1) + "\n")
        temporary.replace(self.file)


def run_cells(
    cells: dict[str, Any],
    results: Results,
    minutes: float,
    launch: Callable[[str, float], dict[str, Any]],
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Measure what the file lacks while there is time; returns the names that are left.

    launch: (name, seconds that remain) -> row; a cell that fails or runs out of time is reported and left.
    """
    end = clock() + 60 * minutes
    left = []
    for name in cells:
        if name in results.cells:
            continue
        if end - clock() < LEAST:
            left.append(name)
            continue
        try:
            results.add(name, launch(name, end - clock()))
            print(f"measured: {name}", flush=True)
        except subprocess.SubprocessError as error:
            print(f"failed:   {name}: {error}", flush=True)
            left.append(name)
    return left


def in_process(script: str, out: Path) -> Callable[[str, float], dict[str, Any]]:
    """Runs a cell as a process of its own: device memory and vLLM's allocator start clean."""

    def launch(name: str, seconds: float) -> dict[str, Any]:
        file = out.with_suffix(".cell")
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, script, "--cell", name, "--cell-out", str(file)]
        run_to_the_end(command, seconds)
        row: dict[str, Any] = json.loads(file.read_text())
        file.unlink()
        return row

    return launch


def run_to_the_end(command: list[str], seconds: float | None, environment: dict[str, str] | None = None) -> None:
    """Raises `subprocess.SubprocessError` when it fails or takes longer; nothing that it started is left behind.

    seconds: None for as long as it takes. Torchrun's workers have sessions of their own, and only torchrun ends them:
    it must not be killed before it has.
    """
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        code = process.wait(seconds)
    finally:
        _end(process)
    if code:
        raise subprocess.CalledProcessError(code, command)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started in its session; nothing to do where all of it has ended."""
    end = time.monotonic() + GRACE
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end:
            process.poll()  # or it counts although it has ended
            os.killpg(process.pid, 0)
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(
    script: str, name: str, description: str, cells: dict[str, Any], measure: Callable[..., dict[str, Any]]
) -> None:
    """The whole program: parse, look for a GPU, measure, print.

    measure: (value of the cell) -> row.
    """
    options = arguments(description, name).parse_args()
    machine = require_gpu(script)
    if options.cell:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # so that scratch folders and workers go, too
        options.cell_out.write_text(json.dumps(measure(cells[options.cell])))
        sys.stdout.flush()
        os._exit(0)  # the row is there: how CUDA, NCCL and vLLM's memory pools are torn down is not measured
    chosen = {name: value for name, value in cells.items() if not options.only or options.only in name}
    results = Results(options.out, machine, options.fresh)
    left = run_cells(chosen, results, options.minutes, in_process(script, options.out))
    print(table({name: results.cells[name] for name in chosen if name in results.cells}))
    if left:
        print(f"{len(left)} left: {', '.join(left)}; the same command goes on")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The numbers of every cell, one line each; nested values are left to the file."""
    if not rows:
        return "nothing measured"
    titles = list(dict.fromkeys(key for row in rows.values() for key, value in row.items() if _is_number(value)))
    lines = [["", *titles]]
    lines += [[name, *(_short(row.get(title)) for title in titles)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_model(directory: Path, model: str, layers: int | None = None, **changes: Any) -> Path:
    """``config.json`` of a model without weights."""
    sizes = MODELS[model] | COMMON | changes
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(sizes, indent=1))
    return directory


def benchmark(name: str) -> Any:
    """A script of benchmarks/ as a module; two of them have namesakes here."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(__file__).parents[1] / f"{name.removeprefix('cpu_')}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        sys.path.append(str(Path(__file__).parents[1]))  # it imports a neighbour
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else "-"
