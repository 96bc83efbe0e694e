"""The CPU stands in for CUDA inside `megatron_device`, and nowhere else."""

import pytest
import torch
from torch.utils._device import _device_constructors

from treepo_mcore.actor import cpu
from treepo_mcore.actor.cpu import megatron_device, on_megatron_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is nothing to stand in for")


def current():
    """What torch has now in every place that the block changes."""
    return {place: getattr(*place) for place in cpu._TABLE}


def unchanged(before):
    return [name for (_, name), value in before.items() if value is not current()[_, name]]


def test_everything_is_replaced_inside_and_restored_after():
    before = current()
    with megatron_device():
        assert len(unchanged(before)) == len(before)
        assert torch.cuda.current_device() == torch.device("cpu")
    assert unchanged(before) == []


def test_restored_after_an_error():
    before = current()
    with pytest.raises(ZeroDivisionError), megatron_device():
        raise ZeroDivisionError
    assert unchanged(before) == []
    with megatron_device():  # and it still works
        assert torch.cuda.current_device() == torch.device("cpu")


def test_nested_blocks_end_with_the_outermost():
    before = current()
    with megatron_device():
        inside = current()
        with megatron_device():
            assert unchanged(inside) == []
        assert unchanged(inside) == []
    assert unchanged(before) == []


def test_nothing_is_patched_outside():
    """vLLM annotates with torch.cuda.Stream and asks for CUDA devices to learn that there are none."""
    assert isinstance(torch.cuda.Stream, type)
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()


def test_no_effect_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = current()
    with megatron_device():
        assert unchanged(before) == []


def test_what_megatron_asks_for_is_answered_with_the_cpu():
    with megatron_device():
        made = [torch.tensor([1.0], device="cuda"), torch.zeros(2, device=torch.device("cuda", 0))]
        made += [torch.empty(2, device=torch.cuda.current_device()), torch.zeros_like(made[0], device="cuda")]
        assert all(tensor.device.type == "cpu" for tensor in made)
        assert made[0].cuda() is made[0]
        assert made[0].type() == "torch.cuda.FloatTensor"
        assert made[0].type(torch.int64).dtype == torch.int64
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    with megatron_device():
        assert torch.zeros(1, device="meta").device.type == "meta"


def test_random_states_are_those_of_the_cpu():
    with torch.random.fork_rng(devices=[]), megatron_device():
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        one = torch.rand(2)
        torch.cuda.set_rng_state(state)
        assert torch.equal(one, torch.rand(2))


def test_decorated_function_runs_inside_and_keeps_its_name():
    @on_megatron_device
    def where(prefix):
        return f"{prefix}{torch.cuda.current_device()}"

    before = current()
    assert where("on ") == "on cpu"
    assert where.__name__ == "where"
    assert unchanged(before) == []


def test_device_contexts_work_inside_and_afterwards():
    """torch looks up what they act on once; that must not be our replacements."""
    _device_constructors.cache_clear()
    with megatron_device(), torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
