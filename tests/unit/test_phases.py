"""Whose turn it is on the device: order of the calls, what moves, refusals, and what an out-of-memory error says."""

from types import SimpleNamespace

import pytest
import torch

from treepo_mcore.actor.costs import fp8_weights, host_memory
from treepo_mcore.actor.memory import HostCopy, PinnedBuffer, storages
from treepo_mcore.checks import check_host_memory
from treepo_mcore.config import ActorConfig, ConfigError, MemoryConfig, parse_config
from treepo_mcore.model.shards import Stage, matrix_parameters, model_parameters, stage_parameters, stages
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.memory import plan_memory
from treepo_mcore.policy import working_bytes
from treepo_mcore.system.allocator import check_allocator
from treepo_mcore.system.host_memory import cgroup_free_bytes
from treepo_mcore.system.phases import GIB, DeviceMemoryError, Phase, Phases, on_device

from test_precision import architecture  # isort: skip

EVERYTHING = {"parameters", "gradients", "optimizer"}


class Recorder:
    """Stands in for actor and engine; `calls` is one list, so that their order shows."""

    def __init__(self):
        self.calls = []
        self.memory = self
        self.bytes = {"parameters": 2 * GIB, "gradients": 4 * GIB, "optimizer": 12 * GIB}

    def keep(self, holders):
        self.calls.append("keep " + " ".join(sorted(holders)))

    def sleep(self):
        self.calls.append("sleep")

    def wake_weights(self):
        self.calls.append("wake weights")

    def wake_cache(self):
        self.calls.append("wake cache")


@pytest.fixture
def made():
    recorder = Recorder()
    working = {Phase.PUSH: {}, Phase.ROLLOUT: {"context": GIB}, Phase.TRAIN: {"activations": 5 * GIB}}
    phases = Phases(MemoryConfig(offload=sorted(EVERYTHING)), recorder, working)
    phases.attach(recorder, weights=2 * GIB, reserved=40 * GIB)
    return phases, recorder.calls


def test_a_step_moves_everything_in_order(made):
    phases, calls = made
    assert calls == ["keep ", "sleep"]
    calls.clear()
    with phases.push():
        calls.append("pushing")
    with phases.rollout():
        calls.append("sampling")
    with phases.train():
        calls.append("training")
    assert calls == [
        "keep parameters",
        "wake weights",
        "pushing",
        "keep ",
        "wake cache",
        "sampling",
        "sleep",
        "keep ",
        "keep gradients optimizer parameters",
        "training",
        "keep ",
    ]
    assert phases.phase is Phase.IDLE
    assert set(phases.metrics()) == {"time/sleep", "time/wake", "time/offload", "time/save_wait"}
    assert phases.metrics() == {}


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((), "rollout", "phase rollout after idle: expected push or train"),
        (("push",), "train", "phase train after push: expected rollout"),
        (("push",), "push", "phase push after push: expected rollout"),
    ],
)
def test_a_wrong_order_is_an_error(made, first, second, words):
    phases, calls = made
    for name in first:
        with getattr(phases, name)():
            pass
    before = list(calls)
    with pytest.raises(RuntimeError, match=words), getattr(phases, second)():
        pytest.fail("the block ran")
    assert calls == before


def test_no_phase_begins_inside_another(made):
    phases, _ = made
    with phases.train(), pytest.raises(RuntimeError, match="phase push after train: expected idle"), phases.push():
        pytest.fail("the block ran")


@pytest.mark.parametrize(
    ("offload", "phase", "expected"),
    [
        (EVERYTHING, Phase.IDLE, set()),
        (EVERYTHING, Phase.PUSH, {"parameters"}),
        ({"optimizer", "gradients"}, Phase.ROLLOUT, {"parameters"}),
        (set(), Phase.ROLLOUT, EVERYTHING),
        (EVERYTHING, Phase.TRAIN, EVERYTHING),
    ],
)
def test_what_stays(offload, phase, expected):
    assert on_device(phase, offload) == expected


def test_out_of_memory_names_the_phase_and_the_biggest_holders(made):
    phases, _ = made
    with pytest.raises(DeviceMemoryError) as caught, phases.train():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "in phase train: optimizer 12.00, activations 5.00, gradients 4.00, parameters 2.00 GiB" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_out_of_memory_on_the_way_into_a_phase_is_named_too(made):
    phases, _ = made

    def refuse():
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")

    phases.engine.wake_weights = refuse
    with pytest.raises(DeviceMemoryError, match="in phase push: parameters"), phases.push():
        pass


def test_other_errors_pass(made):
    with pytest.raises(RuntimeError, match=r"^something else$"), made[0].train():
        raise RuntimeError("something else")


def test_checkpoints_need_host_memory():
    arch = architecture(vocab=1024, tied=False)
    parameters = model_parameters(arch)

    def passes_through(world, **actor):
        return host_memory(config(actor=actor), arch, world, world)["checkpoint"]

    assert passes_through(1) == 20 * parameters  # saving: gathered by one rank
    assert passes_through(8) == 8 * 12 * parameters  # loading: read by all
    fullest = max(stage_parameters(arch, stage, ActorConfig(pp=4)) for stage in stages(ActorConfig(pp=4), 4))
    assert passes_through(4, pp=4) == 4 * 20 * fullest  # all stages on one node, and each of them is gathered
    assert passes_through(8, tp=8) == pytest.approx(20 * parameters, rel=2e-2)  # norms are on every rank


def test_the_prediction_names_every_phase(made):
    text = made[0].describe()
    assert "push 4.00 (parameters 2.00, engine weights 2.00)" in text
    assert "rollout 41.00 (engine 40.00, context 1.00)" in text
    assert "train 23.00 (optimizer 12.00, activations 5.00, gradients 4.00, parameters 2.00)" in text


@pytest.mark.parametrize("actor", [{}, {"fp8": "current"}, {"recompute": "full", "attention": "dense"}])
def test_what_comes_and_goes_is_what_the_planner_says(actor):
    arch = architecture()
    settings = config(actor=actor | {"micro_batch_tokens": 10000})
    live = SimpleNamespace(arch=arch, layers=arch.layers, grid=SimpleNamespace(pp=1, pp_rank=0))
    found = working_bytes(settings, live, (9, 0))
    planned = plan_memory(settings, arch, make_cluster("h100", "ib400", 1, 1), 10000).phases
    staging = {"staging": 256 << 20}
    assert found[Phase.TRAIN] | dict.fromkeys(EVERYTHING) == planned["update"] | staging | dict.fromkeys(EVERYTHING)
    assert found[Phase.PUSH] == {"context": planned["push"]["context"]} | staging
    assert found[Phase.ROLLOUT] == found[Phase.PUSH] | {"CUDA graphs": planned["rollout"]["CUDA graphs"]}
    stays = config(actor=actor, memory={"offload": []})
    fp8 = {"FP8 weights"} if "fp8" in actor else set()
    assert set(working_bytes(stays, live, (9, 0))[Phase.PUSH]) == {"context", "staging"} | fp8


@pytest.mark.parametrize(
    ("actor", "capability", "bytes_a_weight"),
    [
        ({}, (9, 0), 0),
        ({"fp8": "current"}, (9, 0), 2 * 3),
        ({"fp8": "current"}, (10, 0), 3),
        ({"fp8": "current"}, (12, 0), 2 * 3),
        ({"fp8": "blockwise"}, (10, 0), 2 * 3),
        ({"fp8": "blockwise", "megatron": {"first_last_layers_bf16": False}}, (9, 0), 2 * 4),
        ({"megatron": {"fp8": "hybrid"}}, (9, 0), 2 * 4),
        ({"fp8": "current", "megatron": {"fp8_param": True, "fp8_param_gather": True}}, (9, 0), 0),
        ({"megatron": {"fp8": "hybrid", "fp8_recipe": "mxfp8"}}, (10, 0), 2 * 4),
    ],
)
def test_quantised_copies_of_weights(actor, capability, bytes_a_weight):
    """Of a first stage with four layers."""
    arch = architecture()
    found = fp8_weights(
        ActorConfig.model_validate(actor | {"tp": 2}), arch, Stage((0, 1, 2, 3), True, False), capability
    )
    assert found == bytes_a_weight * (matrix_parameters(arch) // arch.layers) // 2


def test_fp8_parameters_are_read_through_plain_copies():
    arch, own = architecture(), {"fp8_param": True, "fp8_param_gather": True}
    live = SimpleNamespace(arch=arch, layers=arch.layers, grid=SimpleNamespace(pp=1, pp_rank=0))
    found = working_bytes(config(actor={"fp8": "current", "megatron": own}), live, (9, 0))
    assert found[Phase.PUSH]["plain copies"] == 2 * 2 * matrix_parameters(arch) // arch.layers  # of two layers in bf16
    assert not {"plain copies", "FP8 weights"} & (set(found[Phase.ROLLOUT]) | set(found[Phase.TRAIN]))


def test_tensors_come_back_and_their_views_stay_valid():
    buffer = torch.arange(1000.0)
    view, other = buffer[10:20].view(2, 5), torch.arange(7, dtype=torch.int16)
    expected = [buffer.clone(), view.clone(), other.clone()]
    copy = HostCopy()
    for _ in range(2):
        copy.out([view, buffer, other])
        assert [t.untyped_storage().nbytes() for t in (buffer, view, other)] == [0, 0, 0]
        assert copy.host_bytes == 4096 + 512
        copy.back()
        for found, want in zip([buffer, view, other], expected, strict=True):
            assert torch.equal(found, want)
    view[0, 0] = -1
    assert buffer[10] == -1


def test_a_host_buffer_grows_when_more_tensors_come():
    first, second = torch.ones(10), torch.ones(1000)
    copy = HostCopy()
    copy.out([first])
    copy.back()
    copy.out([first, second])
    copy.back()
    assert (first.sum(), second.sum()) == (10, 1000)
    assert len(storages([first, first[2:], second])) == 2


@pytest.mark.parametrize(
    ("environment", "tp", "words"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, 1, "set it in PYTORCH_CUDA_ALLOC_CONF"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, 1, "no memory pools"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, 2, r"rollout\.tp: 2, .*disable_custom_all_reduce"),
    ],
)
def test_allocator_settings_that_do_not_go_together(environment, tp, words):
    with pytest.raises(ConfigError, match=words):
        check_allocator(environment, config(rollout={"tp": tp}).rollout)


@pytest.mark.parametrize("rollout", [{}, {"tp": 2, "engine": {"disable_custom_all_reduce": True}}])
def test_expandable_segments_go_with_one_gpu_an_engine_or_nccl(rollout):
    check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, config(rollout=rollout).rollout)


def config(**sections):
    return parse_config({"model": {"path": "m"}, "data": {"train": "d"}} | sections)


def test_host_memory_is_predicted_from_the_model():
    arch = architecture(vocab=1024)
    layer = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256 + 2 * 128  # q and o, k and v, MLP, norms
    parameters = 4 * layer + 2 * 1024 * 128 + 128

    def kept(world, ranks, gpu=True, memory=None, **actor):
        needs = host_memory(config(actor=actor, memory=memory or {}), arch, world, ranks, gpu=gpu)
        return sum(size for name, size in needs.items() if name != "checkpoint")

    assert host_memory(config(), arch, 1, 1, gpu=False) == {}
    assert kept(1, 1) == 12 * parameters
    assert kept(4, 2, tp=2) == pytest.approx(2 * 12 * parameters / 4, rel=4e-3)  # norms are on every rank
    assert kept(2, 2, dtype="float32", optimizer={"distributed": False}) == 2 * 8 * parameters
    assert kept(1, 1, gpu=False, reference="host", memory={"offload": ["parameters"]}) == 6 * parameters


def test_too_little_host_memory_is_refused_before_anything_is_built():
    arch = architecture(hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8, head_dim=128, vocab=128256)
    with pytest.raises(ConfigError, match=r"memory\.host_gib: 8 ranks of this node would need .* allowed are 100\.0"):
        check_host_memory(config(actor={"tp": 8}, memory={"host_gib": 100}), arch, 8, 8, gpu=True)
    check_host_memory(config(actor={"tp": 8}, memory={"host_gib": 100}), arch, 8, 8, gpu=False)


def test_a_limit_on_the_job_counts_as_the_memory_there_is(tmp_path):
    for folder, limit in (("", "max"), ("job", "1000"), ("job/step", "max")):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text("700\n")
        (place / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert list(cgroup_free_bytes(tmp_path, "job/step")) == [700]
    assert list(cgroup_free_bytes(tmp_path, "")) == []


def test_a_prediction_beyond_the_gpu_is_said(made, monkeypatch):
    phases, _ = made
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1))
    assert phases.describe().endswith("more than the 0.00 of this GPU: push, rollout, train")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 50))
    assert "more than" not in phases.describe()


class Cudart:
    """Knows which addresses are pinned, as the driver does."""

    def __init__(self):
        self.pinned = set()

    def cudaHostRegister(self, address, size, flags):
        if address in self.pinned:
            return 712
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address):
        self.pinned.remove(address)


def test_pinned_memory_is_given_back_with_its_owner(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    buffer = PinnedBuffer(4096)
    assert cudart.pinned == {buffer.bytes.data_ptr()}
    view = buffer.bytes[:8]
    del buffer
    assert cudart.pinned == set()
    view.zero_()
