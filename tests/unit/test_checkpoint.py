"""What Megatron's optimizers need around saving and loading, and the rate that a run ends with."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import make_model

from treepo_mcore.actor.actor import _scheduler
from treepo_mcore.actor.checkpoint import check_same
from treepo_mcore.actor.saved import check_saved
from treepo_mcore.actor.sharded import any_adam
from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.model.families import parts_of


def test_every_kind_of_adam_has_state_before_its_first_step():
    """Megatron reads the moments of a fused Adam that has none (apex's and TransformerEngine's need a GPU)."""
    filled = []
    fused = SimpleNamespace(optimizer=object(), config=object(), init_state_fn=lambda *both: filled.append(both))
    parameter = torch.nn.Parameter(torch.ones(3))
    plain = SimpleNamespace(optimizer=torch.optim.AdamW([parameter]))
    nothing = SimpleNamespace(optimizer=None)
    with any_adam(SimpleNamespace(chained_optimizers=[fused, plain, nothing])):
        assert filled == [(fused.optimizer, fused.config)]
        assert set(plain.optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_step_still_learns(decay, steps):
    config = ActorConfig.model_validate({"optimizer": {"lr": 1.0, "lr_decay": decay}})
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    scheduler = _scheduler(adam, config, steps)
    rates = []
    for _ in range(steps):
        scheduler.step(increment=1)
        rates.append(adam.param_groups[0]["lr"])
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1


@pytest.mark.parametrize("other", ["none", "iter_0000004"])
def test_ranks_that_find_different_checkpoints(monkeypatch, other):
    """A directory of each node's own: only the first node has the tracker."""

    def gather(everyone, mine):
        everyone[:] = [mine, other]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(
        ConfigError, match=rf"run: rank 0 finds checkpoint iter_0000008, rank 1 {other}; it has to be one"
    ):
        check_same(Path("run"), Path("run/checkpoints/iter_0000008"))
    monkeypatch.setattr(dist, "all_gather_object", lambda everyone, mine: everyone.__setitem__(slice(None), [mine] * 2))
    check_same(Path("run"), None)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return read_sizes(make_model(tmp_path_factory.mktemp("model"), "qwen2"))


@pytest.fixture
def saved(sizes, tmp_path, monkeypatch):
    """The layers of a checkpoint, as Megatron lays them out."""
    shapes = {part.megatron[0]: (sizes.layers, *part.actor_shape(1)) for part in parts_of(sizes).layers[0]}
    tensors = {f"decoder.layers.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    dcp.save(tensors, checkpoint_id=tmp_path / "iter_0000003", no_dist=True)
    (tmp_path / "iter_0000003" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    check_saved(tmp_path / "iter_0000003", sizes)
    return tmp_path / "iter_0000003"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.json", None, "metadata.json: missing"),
        ("metadata.json", b"{", "metadata.json: not valid JSON"),
        ("metadata.json", b"[]", "metadata.json: expected a JSON object, found list"),
        ("metadata.json", b"{}", "metadata.json: expected sharded_backend torch_dist, found None"),
        (".metadata", None, ".metadata: missing, the checkpoint is not whole"),
        (".metadata", b"garbage", ".metadata: not the metadata of a checkpoint (UnpicklingError)"),
        (".metadata", b"", ".metadata: not the metadata of a checkpoint (EOFError)"),
        ("__0_0.distcp", None, "__0_0.distcp: missing, the checkpoint is not whole"),
        ("__0_0.distcp", b"short", "__0_0.distcp: cut short, expected"),
    ],
)
def test_a_damaged_checkpoint_is_told_before_a_model_is_built(saved, sizes, name, content, words):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        check_saved(saved, sizes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_checkpoint_that_somebody_else_wrote(saved, sizes):
    os.chown(saved / ".metadata", 12345, -1)
    with pytest.raises(ConfigError, match=r"\.metadata: belongs to user 12345, expected 0: loading .* runs code"):
        check_saved(saved, sizes)


def test_a_checkpoint_of_another_model(saved, sizes):
    with pytest.raises(
        ConfigError, match=r"of another model: decoder.layers.* has the shape \[4, .*\], expected \[5, "
    ):
        check_saved(saved, replace(sizes, layers=5))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        check_saved(saved.with_name("iter_0000004"), sizes)
