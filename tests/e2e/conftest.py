"""The quickstart's task around an untrained model, made once a session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point the quickstart's configuration to its data and an untrained model."""
    folder = tmp_path_factory.mktemp("task")
    python = [sys.executable]
    subprocess.run(
        [*python, QUICKSTART / "make_data.py", "--out", folder, "--train", "200", "--eval", "16"], check=True
    )
    corpus = ["--corpus", folder / "sft.jsonl", "--out", folder / "tokenizer", "--vocab-size", "320"]
    subprocess.run([*python, QUICKSTART / "make_tokenizer.py", *corpus], check=True)
    make = (
        "import sys; from pathlib import Path; from warmup import make_model; make_model(*map(Path, sys.argv[1:]), 0)"
    )
    subprocess.run([*python, "-c", make, folder / "tokenizer", folder / "model"], check=True, cwd=QUICKSTART)
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        "trainer.prompts_per_step=4",
        "trainer.prompts_per_update=2",
        "filter.enabled=false",
    ]
