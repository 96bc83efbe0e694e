"""What every test needs before torch is imported, and the small models that many share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treepo_mcore.system.environment import has_gpu, prepare_environment

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
prepare_environment()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_gpu():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """Function (family, **overrides) -> directory of a tiny model, written once a session for equal arguments."""
    from models import make_model

    made = {}

    def get(family, **overrides):
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point the quickstart's configuration to its data and an untrained model."""
    quickstart = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
    folder = tmp_path_factory.mktemp("task")
    python = [sys.executable]
    subprocess.run(
        [*python, quickstart / "make_data.py", "--out", folder, "--train", "200", "--eval", "16"], check=True
    )
    corpus = ["--corpus", folder / "sft.jsonl", "--out", folder / "tokenizer", "--vocab-size", "320"]
    subprocess.run([*python, quickstart / "make_tokenizer.py", *corpus], check=True)
    made = ["--tokenizer", folder / "tokenizer", "--out", folder / "model"]
    subprocess.run([*python, quickstart / "make_model.py", *made], check=True)
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        "trainer.prompts_per_step=4",
        "trainer.prompts_per_update=2",
        "filter.enabled=false",
    ]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A torch.distributed job of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
