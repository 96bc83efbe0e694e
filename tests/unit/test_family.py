"""Families: parts cover the checkpoint once, and slabs of larger tensors are pieces like others."""

import json
from dataclasses import replace

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file

from treepo_mcore.config import ConfigError
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.model.decoder import decoder_parts
from treepo_mcore.model.families import FAMILIES, parts_of
from treepo_mcore.model.family import Parts, Source, hf_shapes
from treepo_mcore.weights.hf import check_weights
from treepo_mcore.weights.layout import Piece, box
from treepo_mcore.weights.plan import make_plan, part_of


@pytest.fixture
def arch(model_directory):
    return read_architecture(model_directory("llama"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Source("mlp.gate_proj.weight", 256, 255), r"mlp.gate_proj.weight: rows 255 to 256 belong to two parts"),
        (Source("mlp.gate_proj.weight", 256, 300), r"mlp.gate_proj.weight: rows 256 to 300 belong to no part"),
        (Source("input_layernorm.weight", 1, 128), r"input_layernorm.weight: parts of None and of 128 columns"),
    ],
)
def test_parts_that_do_not_cover_a_tensor_once_are_named(arch, second, message):
    parts = decoder_parts(arch)
    layer = [
        replace(part, sources=(part.sources[0], second)) if part.cut == "stacked" else part for part in parts.layers[0]
    ]
    with pytest.raises(ConfigError, match=message):
        hf_shapes(Parts(parts.outer, (tuple(layer),)))


def test_a_tensor_that_no_part_holds_is_named(model_directory, tmp_path):
    """A layer that config.json does not have, say: it would be trained as another model than the files hold."""
    directory = make_model(tmp_path / "model", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"model.layers.3.\S+ has no place in a llama model as config.json describes"):
        check_weights(directory, read_architecture(directory))


def test_buffers_and_a_tied_head_are_passed_over(tmp_path):
    directory = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors | more, directory / "model.safetensors")
    check_weights(directory, read_architecture(directory))


def test_every_family_is_found_by_its_name():
    for family in FAMILIES.values():
        assert family.name in {known.name for known in FAMILIES.values()}
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)


def test_flops_of_a_token_are_twice_its_weights(arch):
    layer = parts_of(arch).layers[0]
    matrices = 128 * 128 * 2 + 2 * 64 * 128 + 3 * 128 * 256
    assert sum(part.flops for part in layer) == 2 * matrices


def test_a_slab_of_a_larger_tensor_is_a_piece():
    """Experts: matrices of the files, stacked in one tensor of three dimensions on the other side."""
    files = {f"experts.{e}.up": torch.randn(6, 4) for e in range(3)}
    sources = [[Piece(name, (0, 0), (6, 4), name, (0, 0)) for name in files]]
    # Rank 1 of two: rows 3 to 6 of every expert, below a run of 2 rows that hold something else.
    targets = [[Piece(name, (3, 0), (3, 4), "stack", (e, 2, 0)) for e, name in enumerate(files)]]
    stack = torch.zeros(3, 5, 4)
    plan = make_plan(sources, targets)
    assert [transfer.target_start for transfer in plan] == [(e, 2, 0) for e in range(3)]
    for whole in plan:
        for transfer in (part_of(whole, 0, 2), part_of(whole, 2, 1)):  # as rounds cut them
            box(stack, transfer.target_start, transfer.shape).copy_(
                box(files[transfer.source_local], transfer.source_start, transfer.shape)
            )
    assert torch.equal(stack[:, 2:], torch.stack([value[3:] for value in files.values()]))
    assert not stack[:, :2].any()
    assert torch.equal(targets[0][1].of_local({"stack": stack}), files["experts.1.up"][3:])
