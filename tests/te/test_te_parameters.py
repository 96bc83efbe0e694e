"""FP8 parameters, of TransformerEngine's real classes on a CPU: read, pushed, moved, and where the optimizer begins.

Quantising takes a GPU, so parameters are made here of bytes and scales; tests/gpu trains with them.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import make_model

from treepo_mcore.actor.memory import ActorMemory, HostCopy, storages
from treepo_mcore.actor.quantised import PlainCopies, data_tensors
from treepo_mcore.config import ActorConfig
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.system.machine import has_module
from treepo_mcore.weights.fp8 import dequantise, quantise

from test_te_spec import HOPPER, grid  # isort: skip

__all__ = ["grid"]  # a fixture

pytestmark = pytest.mark.skipif(
    not has_module("transformer_engine"), reason="TransformerEngine is not installed; run `make test-te`"
)

SETTINGS = {"optimizer": {"distributed": True}, "megatron": {"fp8_param": True, "fp8_param_gather": True}}


def blockwise(weight):
    """TransformerEngine's tensor with 128 x 128 blocks, and its values in float32."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor

    values, scale = quantise(weight)
    quantiser = Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=True)
    padded = torch.zeros(quantiser.get_scale_shape(weight.shape, False))
    padded[:, : scale.shape[1]] = scale
    tensor = Float8BlockwiseQTensor(
        shape=weight.shape,
        dtype=torch.bfloat16,
        rowwise_data=values.view(torch.uint8),
        rowwise_scale_inv=padded,
        columnwise_data=values.view(torch.uint8).T.contiguous(),
        columnwise_scale_inv=torch.zeros(quantiser.get_scale_shape(weight.shape, True)),
        fp8_dtype=tex.DType.kFloat8E4M3,
        quantizer=quantiser,
        is_2D_scaled=True,
        device="cpu",
    )
    return tensor, dequantise(values, scale)


def current(weight):
    """The same with one scale."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Tensor

    scale = weight.abs().max().float() / 448
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    tensor = Float8Tensor(
        shape=weight.shape,
        dtype=torch.bfloat16,
        data=values.view(torch.uint8),
        data_transpose=values.view(torch.uint8).T.contiguous(),
        fp8_scale_inv=scale.view(1),
        fp8_dtype=tex.DType.kFloat8E4M3,
        quantizer=Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, device=torch.device("cpu")),
        device="cpu",
    )
    return tensor, values.float() * scale


@pytest.fixture
def alone():
    """A job of one; others of this file pretend to be in a larger one."""
    from treepo_mcore.actor.parallel import leave_grid

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave_grid()
    dist.destroy_process_group()


KINDS = pytest.mark.parametrize("kind", [blockwise, current])


def parameter(kind, shape=(256, 384), seed=0):
    """A parameter as TransformerEngine's layers have it, what it was made from, and its values."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tensor, values = kind(weight)
    made = torch.nn.Parameter(tensor)
    made.get_high_precision_init_val = lambda: weight
    made.clear_high_precision_init_val = lambda: None
    return made, weight, values.bfloat16()


@KINDS
def test_copies_are_read_and_give_their_memory_up(kind):
    made, _, values = parameter(kind)
    copies = PlainCopies({"w": made, "norm": torch.nn.Parameter(torch.ones(4))})
    assert set(copies.tensors) == {"w"}
    copies.release()
    assert copies.tensors["w"].untyped_storage().nbytes() == 0
    for _ in range(2):
        with copies.readable():
            assert torch.equal(copies.tensors["w"], values)
            assert type(copies.tensors["w"]) is torch.Tensor
        assert copies.tensors["w"].untyped_storage().nbytes() == 0


@KINDS
def test_copies_follow_a_parameter_into_megatrons_buffer(kind):
    from megatron.core.fp8_utils import modify_underlying_storage

    made, _, values = parameter(kind)
    copies = PlainCopies({"w": made})
    buffer = torch.zeros(2 * made.numel(), dtype=torch.uint8)
    modify_underlying_storage(made, buffer[512 : 512 + made.numel()].view(made.shape))
    with copies.readable():
        assert torch.equal(copies.tensors["w"], values)
    buffer[512] ^= 0x80  # the first weight's sign, as a gather would write it
    with copies.readable():
        assert copies.tensors["w"][0, 0] == -values[0, 0] != 0
        assert torch.equal(copies.tensors["w"][0, 1:], values[0, 1:])


@KINDS
def test_bytes_move_to_the_host_and_back(kind):
    made, _, values = parameter(kind)
    copies, host = PlainCopies({"w": made}), HostCopy()
    assert [tensor.dtype for tensor in data_tensors(made)] == [torch.uint8, torch.uint8]
    host.out(data_tensors(made))
    assert sum(storage.nbytes() for storage in storages(data_tensors(made))) == 0
    assert host.host_bytes == 2 * made.numel()
    host.back()
    with copies.readable():
        assert torch.equal(copies.tensors["w"], values)


@KINDS
def test_a_push_takes_the_values(kind, alone):
    from treepo_mcore.weights.layout import rows
    from treepo_mcore.weights.plan import make_plan
    from treepo_mcore.weights.transfer import Push

    made, _, values = parameter(kind)
    copies = PlainCopies({"w": made})
    plan = make_plan(
        [[rows("a", 0, 100, 384, "w", 0), rows("b", 0, 156, 384, "w", 100)]],
        [[rows("b", 0, 156, 384, "t", 0), rows("a", 0, 100, 384, "t", 156)]],
    )
    target = torch.zeros(256, 384, dtype=torch.bfloat16)
    push = Push(plan, copies.tensors, {"t": target})  # as in a run, the views are made once
    copies.release()
    with copies.readable():
        push.run()
    assert torch.equal(target, torch.cat([values[100:], values[:100]]))


@KINDS
def test_a_module_in_bf16_keeps_them(kind):
    """Megatron's wrapper for half precision converts every parameter."""
    module = torch.nn.Module()
    made, _, _ = parameter(kind)
    module.weight = made
    module.bfloat16()
    assert module.weight is made
    assert [tensor.dtype for tensor in data_tensors(module.weight)] == [torch.uint8, torch.uint8]


def made_model(kind, directory):
    """A model with FP8 parameters in Megatron's wrapper, its optimizer, and (made from, values) by linear layer."""
    from megatron.core.optimizer import get_megatron_optimizer

    from treepo_mcore.actor.actor import _data_parallel
    from treepo_mcore.actor.cpu import megatron_device
    from treepo_mcore.actor.model import _build_chunk, megatron_configs

    arch = read_architecture(make_model(directory, "llama"))
    name = "current" if kind is current else "blockwise"
    with megatron_device():
        configs = megatron_configs(ActorConfig.model_validate(SETTINGS | {"fp8": name}), arch, HOPPER)
        config = copy.copy(configs.transformer)
        config.init_model_with_meta_device, config.use_cpu_initialization = True, False
        config.fp8_param = False  # they are made here, without a GPU
        with torch.device("meta"), mock.patch.object(torch.cuda, "is_available", return_value=True):
            model = _build_chunk(config, arch, None, True)
        model.to_empty(device="cpu")
        loaded = {name: fill(module, kind, seed) for seed, (name, module) in enumerate(linear_layers(model))}
        chunks = _data_parallel([model], configs)
        return chunks, get_megatron_optimizer(configs.optimizer, chunks), loaded


@KINDS
def test_the_optimizer_begins_with_the_weights_as_loaded(kind, alone, tmp_path):
    """Megatron's data-parallel wrapper and distributed optimizer over a model of TransformerEngine's layers."""
    from treepo_mcore.actor.layout import megatron_parameters
    from treepo_mcore.actor.parallel import build_grid

    build_grid(ActorConfig(), seed=0)
    chunks, optimizer, loaded = made_model(kind, tmp_path)
    memory = ActorMemory(chunks, optimizer, megatron_parameters(chunks))
    assert len(loaded) == 4 * 2  # layers between the first and the last
    assert {buffer.param_dtype for buffer in chunks[0].buffers} == {torch.uint8, torch.bfloat16}
    copies = PlainCopies(megatron_parameters(chunks))
    assert {name.removeprefix("0.") for name in copies.tensors} == {f"{name}.weight" for name in loaded}
    with copies.readable():
        for name, (_, values) in loaded.items():
            assert torch.equal(copies.tensors[f"0.{name}.weight"], values), name
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    for weight, _ in loaded.values():
        assert any(torch.equal(master, weight.float().flatten()) for master in masters)
    # One byte a weight and the transposed one, two for the others; float32 weights and two moments.
    weights = sum(weight.numel() for weight, _ in loaded.values())
    others = sum(p.numel() for p in chunks[0].parameters()) - weights
    assert memory.bytes["parameters"] == pytest.approx(2 * (weights + others), rel=0.01)
    assert memory.bytes["optimizer"] == 12 * (weights + others)


@KINDS
def test_a_checkpoint_is_that_of_plain_parameters(kind, alone, tmp_path):
    """Saved with FP8 parameters, read where they are in bf16. On a GPU Megatron's writer dequantises by itself."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    from treepo_mcore.actor.cpu import megatron_device
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.actor.sharded import sharded_state

    build_grid(ActorConfig(), seed=0)
    chunks, optimizer, loaded = made_model(kind, tmp_path / "model")
    with megatron_device():
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.init_state_fn(part.optimizer, part.config)  # moments, which come with the first step
        actor = SimpleNamespace(chunks=chunks, optimizer=optimizer)
        state = sharded_state(actor, "fully_reshardable", loading=False)
        force_all_tensors_to_non_fp8(state)
        (tmp_path / "saved").mkdir()
        dist_checkpointing.save(state, str(tmp_path / "saved"))
        found = dist_checkpointing.load_plain_tensors(str(tmp_path / "saved"))
    for name, (weight, values) in loaded.items():
        number = int(name.split(".")[2])
        (saved,) = [
            tensor[number] if tensor.dim() == 3 else tensor
            for key, tensor in found.items()
            if key.endswith(f"{name.split('.', 3)[3]}.weight") and "optimizer" not in key
        ]
        assert torch.equal(saved, values), name
        assert weight.shape == saved.shape


def linear_layers(model):
    """Those that run in FP8, with their names."""
    for name, module in model.named_modules():
        if "linear_" in name and name.split(".")[2] in ("1", "2"):
            yield name, module


def fill(module, kind, seed):
    """Puts an FP8 parameter where a linear layer has its weight; returns what it was made from, and its values."""
    old = module.weight
    made, weight, values = parameter(kind, tuple(old.shape), seed)
    for key in ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce", "sequence_parallel"):
        if hasattr(old, key):
            setattr(made, key, getattr(old, key))
    module.weight = made
    return weight, values


def test_a_model_on_paper_has_plain_parameters(grid, tmp_path):
    from treepo_mcore.actor.model import build_meta_model, megatron_configs

    grid(1, 1, 0)
    arch = read_architecture(make_model(tmp_path, "llama"))
    configs = megatron_configs(ActorConfig.model_validate(SETTINGS | {"fp8": "current"}), arch, HOPPER)
    assert (configs.transformer.fp8_param, configs.ddp.fp8_param_gather) == (True, True)
    for tensor in build_meta_model(configs, arch)[0].parameters():
        assert type(tensor) is torch.nn.Parameter
