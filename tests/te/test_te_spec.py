"""The real TransformerEngine layer spec on meta tensors: built with our attention, every parameter in the layout.

`make test-te` installs TransformerEngine and runs this; elsewhere it skips. No kernel runs: there need be no GPU.
"""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import make_model

from treepo_mcore.actor.attention import TreeAttention
from treepo_mcore.actor.cpu import megatron_device
from treepo_mcore.config import ActorConfig
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.system.machine import Machine, has_module, this_machine
from treepo_mcore.weights.layout import hf_shapes

pytestmark = pytest.mark.skipif(
    not has_module("transformer_engine"), reason="TransformerEngine is not installed; run `make test-te`"
)

# A GPU that is not there: the layers are chosen and built, not run.
HOPPER = Machine(capability=(9, 0), cuda=(13, 0), te=(2, 16, 1))
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {},
    "phi3": {},
}


@pytest.fixture(params=FAMILIES)
def arch(request, tmp_path):
    return read_architecture(make_model(tmp_path / "model", request.param.split()[0], **FAMILIES[request.param]))


@pytest.fixture
def grid():
    """Function (tp, pp, rank): Megatron's groups as rank `rank` of a job sees them; nothing is ever sent."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def enter(tp, pp, rank):
        leave()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
        with megatron_device():
            parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)

    def leave():
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    yield enter
    leave()


def build(arch, te_layers, **settings):
    """This rank's model on the meta device."""
    from treepo_mcore.actor.model import _build_chunk, megatron_configs

    with megatron_device():
        configs = megatron_configs(ActorConfig.model_validate(settings), arch, HOPPER)
        config = copy.copy(configs.transformer)
        config.init_model_with_meta_device, config.use_cpu_initialization = te_layers, not te_layers
        # TransformerEngine's modules ask only whether CUDA is there; on the meta device they do not use it.
        with torch.device("meta"), mock.patch.object(torch.cuda, "is_available", return_value=True):
            return _build_chunk(config, arch, None, te_layers)


def test_this_machine_has_it():
    from megatron.core.extensions.transformer_engine import HAVE_TE

    assert HAVE_TE
    assert this_machine().te >= (2, 14)


def test_layers_are_transformer_engines_with_our_attention(arch, grid):
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    grid(1, 1, 0)
    model = build(arch, True)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        assert isinstance(attention.core_attention, TreeAttention)
        assert isinstance(attention.linear_qkv, TELayerNormColumnParallelLinear)
        assert isinstance(attention.linear_proj, TERowParallelLinear)
        assert isinstance(layer.mlp.linear_fc1, TELayerNormColumnParallelLinear)
        assert isinstance(layer.mlp.linear_fc2, TERowParallelLinear)
    norm = model.decoder.final_layernorm
    assert type(norm) is type(TENorm(model.config, arch.hidden, arch.norm_eps))
    assert norm.eps == arch.norm_eps
    assert model.decoder.layers[0].mlp.linear_fc1.eps == arch.norm_eps


def test_quantised_copies_of_weights_are_found_and_forgotten(grid, tmp_path):
    from treepo_mcore.actor.precision import forget_fp8_copies

    grid(1, 1, 0)
    model = build(read_architecture(make_model(tmp_path, "llama")), True, fp8="current")
    modules = [module for module in model.modules() if hasattr(module, "_fp8_workspaces")]
    assert len(modules) == 4 * 4  # linear layers of four layers
    for module in modules:
        module._fp8_workspaces["weight"] = torch.zeros(1)
    forget_fp8_copies(model)
    assert not any(module._fp8_workspaces for module in modules)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("fp8", ["none", "current", "blockwise"])
def test_ranks_hold_every_element(arch, grid, tp, pp, fp8):
    """Once, but replicated tensors on every rank of a stage, and a tied embedding on both ends of a pipeline."""
    from treepo_mcore.actor.layout import megatron_layout
    from treepo_mcore.actor.parallel import Place

    held = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(arch).items()}
    for rank in range(tp * pp):
        grid(tp, pp, rank)
        settings = {"tp": tp, "pp": pp, "sequence_parallel": tp > 1, "fp8": fp8}
        model = build(arch, True, **settings)
        for piece in megatron_layout([model], arch, Place(rank % tp)):
            held[piece.tensor][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))] += 1
    for name, count in held.items():
        copies = tp if "norm" in name else 2 if arch.tied and pp > 1 and "embed" in name else 1
        assert count.eq(copies).all(), name


def test_same_tensors_as_megatrons_own_layers(arch, grid):
    """Shapes, dtypes and places in the checkpoint do not depend on whose layers they are."""
    from treepo_mcore.actor.layout import megatron_layout
    from treepo_mcore.actor.parallel import Place

    tables = []
    for te_layers in (True, False):
        grid(2, 1, 1)
        model = build(arch, te_layers, tp=2)
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        tables.append(
            {
                (p.tensor, p.start, p.shape, p.local_start, shapes[p.local[2:]])
                for p in megatron_layout([model], arch, Place(1))
            }
        )
    assert tables[0] == tables[1]
    assert tables[0]
