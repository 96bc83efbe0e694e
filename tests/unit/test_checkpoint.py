"""What Megatron's optimizers need around saving and loading, and the rate that a run ends with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from treepo_mcore.actor.actor import _scheduler
from treepo_mcore.actor.checkpoint import _any_adam, check_same
from treepo_mcore.config import ActorConfig, ConfigError


def test_every_kind_of_adam_has_state_before_its_first_step():
    """Megatron reads the moments of a fused Adam that has none (apex's and TransformerEngine's need a GPU)."""
    filled = []
    fused = SimpleNamespace(optimizer=object(), config=object(), init_state_fn=lambda *both: filled.append(both))
    parameter = torch.nn.Parameter(torch.ones(3))
    plain = SimpleNamespace(optimizer=torch.optim.AdamW([parameter]))
    nothing = SimpleNamespace(optimizer=None)
    with _any_adam(SimpleNamespace(chained_optimizers=[fused, plain, nothing])):
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
