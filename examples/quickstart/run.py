"""The quickstart: make data, tokenizer and a warm model, then train the model with TreePO on two processes.

    python examples/quickstart/run.py [--nproc N] [--experts] [key=value ...]

With --experts the model is a mixture of eight experts in each layer, spread over the processes (actor.ep).
What is made once is kept under .cache/quickstart; `key=value` goes to the trainer (examples/quickstart/config.yaml).
The last line is one JSON object, also in the run's summary.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from treepo_mcore.config import Config, ConfigError, load_config
from treepo_mcore.system.environment import prepare_environment

HERE = Path(__file__).resolve().parent
CACHE = Path(".cache/quickstart")
MADE_BY = (
    "make_data.py",
    "make_tokenizer.py",
    "make_model.py",
    "warmup.yaml",
)  # a change of these makes the cache stale


def torchrun(nproc: int, *command: str) -> None:
    """Run a command on `nproc` processes of this machine; a failure ends the quickstart with its exit status."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    code = subprocess.run([*launcher, *command]).returncode
    if code:
        sys.exit(code)


def folder(experts: bool) -> Path:
    """Of the warm model."""
    return CACHE / "experts" if experts else CACHE


def layout(nproc: int, experts: bool) -> list[str]:
    """Overrides for a mixture."""
    return [f"model.path={folder(experts) / 'model'}", f"actor.ep={nproc}"] if experts else []


def prepare(nproc: int, experts: bool) -> float:
    """Make what is not cached; returns the seconds that the warm-up took when it ran, now or before."""
    own = folder(experts)
    stamp = own / "made.json"
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in MADE_BY)).hexdigest()
    if stamp.is_file() and json.loads(stamp.read_text())["sha256"] == digest:
        seconds: float = json.loads(stamp.read_text())["warmup_seconds"]
        print(f"quickstart: using the warm model under {own} (its warm-up took {seconds:.0f} s)", flush=True)
        return seconds
    shutil.rmtree(own, ignore_errors=True)
    begin = time.perf_counter()
    data, tokenizer = CACHE / "data", CACHE / "tokenizer"
    print("quickstart: making data and tokenizer", flush=True)
    subprocess.run([sys.executable, HERE / "make_data.py", "--out", data], check=True)
    corpus = data / "sft.jsonl"
    subprocess.run([sys.executable, HERE / "make_tokenizer.py", "--corpus", corpus, "--out", tokenizer], check=True)
    print("quickstart: warming a small model up by supervised training", flush=True)
    make_model = [sys.executable, HERE / "make_model.py", "--tokenizer", tokenizer, "--out", own / "start"]
    subprocess.run([*make_model, *(["--experts", "8"] if experts else [])], check=True)
    overrides = [f"run.dir={own / 'warmup'}", *layout(nproc, experts), f"model.path={own / 'start'}"]
    torchrun(nproc, "-m", "treepo_mcore", "sft", str(HERE / "warmup.yaml"), *overrides)
    (own / "warmup" / "policy").rename(own / "model")
    seconds = time.perf_counter() - begin
    stamp.write_text(json.dumps({"sha256": digest, "warmup_seconds": round(seconds, 1)}))
    return seconds


def read_config(overrides: list[str]) -> Config:
    """The trainer would find a bad key too, but only behind the warm-up."""
    try:
        return load_config(HERE / "config.yaml", overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def start_over(config: Config, overrides: list[str]) -> list[str]:
    """Overrides with which a run that has ended begins anew; one that was cut off goes on."""
    summary = config.run.dir / "summary.json"
    if not summary.is_file() or any(override.startswith("run.resume=") for override in overrides):
        return overrides
    print(f"quickstart: {config.run.dir} holds a finished run, starting over", flush=True)
    summary.unlink()
    return [*overrides, "run.resume=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="processes of the warm-up and the training run")
    parser.add_argument("--prepare", action="store_true", help="make what is missing of data and model, train nothing")
    parser.add_argument("--experts", action="store_true", help="train a mixture of experts")
    parser.add_argument("overrides", nargs="*", help="key=value for the trainer")
    arguments = parser.parse_args()
    prepare_environment()
    given = [*layout(arguments.nproc, arguments.experts), *arguments.overrides]
    config = read_config(given)
    warmup_seconds = prepare(arguments.nproc, arguments.experts)
    if arguments.prepare:
        return
    overrides = start_over(config, given)
    begin = time.perf_counter()
    torchrun(arguments.nproc, "-m", "treepo_mcore", "train", str(HERE / "config.yaml"), *overrides)
    file = config.run.dir / "summary.json"
    summary = json.loads(file.read_text())
    summary["warmup_seconds"] = round(warmup_seconds, 1)
    summary["seconds"] = round(warmup_seconds + time.perf_counter() - begin, 1)
    file.write_text(json.dumps(summary) + "\n")
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
