"""Directories in and out: what is loaded and exported again is the same, byte for byte.

How Megatron's and vLLM's layouts tile the tensors is in test_weights_plan.py.
"""

import json

import pytest
import torch
from models import EOS_IDS, Reference, make_model
from safetensors.torch import load_file, save_file

from treepo_mcore.actor.layout import parameter_pieces
from treepo_mcore.actor.parallel import Place
from treepo_mcore.config import ConfigError
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.weights import export
from treepo_mcore.weights.export import export_directory, plan_shards
from treepo_mcore.weights.hf import check_weights, gather_tensors, load_pieces
from treepo_mcore.weights.layout import Piece, hf_shapes

FAMILIES = {"qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "llama": {"num_key_value_heads": 1}, "phi3": {}}


def local_shapes(arch, tp):
    """Megatron's parameters of a rank of one stage."""
    rows = (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp
    vocab = -(-arch.vocab // (128 * tp)) * 128
    shapes = {
        "embedding.word_embeddings.weight": (vocab, arch.hidden),
        "decoder.final_layernorm.weight": (arch.hidden,),
    }
    if not arch.tied:
        shapes["output_layer.weight"] = (vocab, arch.hidden)
    for layer in range(arch.layers):
        p = f"decoder.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (arch.hidden,),
            p + "pre_mlp_layernorm.weight": (arch.hidden,),
            p + "self_attention.linear_qkv.weight": (rows, arch.hidden),
            p + "self_attention.linear_proj.weight": (arch.hidden, arch.heads * arch.head_dim // tp),
            p + "mlp.linear_fc1.weight": (2 * arch.ffn // tp, arch.hidden),
            p + "mlp.linear_fc2.weight": (arch.hidden, arch.ffn // tp),
        }
        if arch.family == "qwen2":
            shapes[p + "self_attention.linear_qkv.bias"] = (rows,)
        if arch.family == "qwen3":
            shapes[p + "self_attention.q_layernorm.weight"] = (arch.head_dim,)
            shapes[p + "self_attention.k_layernorm.weight"] = (arch.head_dim,)
    return shapes


def pieces_of(arch, tp, rank) -> list[Piece]:
    shapes = local_shapes(arch, tp)
    return [
        piece for name, shape in shapes.items() for piece in parameter_pieces(arch, name, name, shape, 0, Place(rank))
    ]


@pytest.fixture(params=FAMILIES)
def directory(request, tmp_path):
    return make_model(tmp_path / "model", request.param, **FAMILIES[request.param])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_hold_every_element_once(directory, tp):
    """But replicated tensors, which every rank holds whole. One KV head on four ranks is split too."""
    arch = read_architecture(directory)
    held = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(arch).items()}
    for rank in range(tp):
        for piece in pieces_of(arch, tp, rank):
            held[piece.tensor][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))] += 1
    for name, count in held.items():
        assert count.eq(tp if "norm" in name else 1).all(), name


@pytest.mark.parametrize("shard_bytes", [None, 300_000])
def test_export_of_what_was_loaded(directory, group, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes or export.SHARD_BYTES)
    arch = read_architecture(directory)
    tensors = {name: torch.full(shape, torch.nan) for name, shape in local_shapes(arch, 1).items()}
    pieces = pieces_of(arch, 1, 0)
    load_pieces(directory, pieces, tensors)
    target = tmp_path / "exported"
    export_directory(directory, target, arch, pieces, tensors, torch.float32)
    source = load_file(directory / "model.safetensors")
    files = sorted(target.glob("*.safetensors"))
    assert (len(files) > 1) == bool(shard_bytes)
    exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(exported[name].view(torch.int32), tensor.view(torch.int32)), name
    assert sorted(p.name for p in target.iterdir() if "part" in p.name) == []
    check_loads(directory, target)


def test_an_export_has_every_file_of_the_tokenizer_and_can_be_written_again(directory, group, tmp_path):
    named = directory / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    for file in (named, directory / "merges.txt", directory / "chat_template.jinja"):
        file.write_text(file.name)
    for file in directory.rglob("*"):
        file.chmod(0o444 if file.is_file() else 0o755)
    arch = read_architecture(directory)
    tensors = {name: torch.zeros(shape) for name, shape in local_shapes(arch, 1).items()}
    target = tmp_path / "out"
    for _ in range(2):
        export_directory(directory, target, arch, pieces_of(arch, 1, 0), tensors, torch.float32)
    for file in (named, directory / "merges.txt", directory / "chat_template.jinja"):
        assert (target / file.relative_to(directory)).read_text() == file.name
    assert all(file.stat().st_mode & 0o200 for file in target.rglob("*"))


def check_loads(source, target):
    """With transformers, tokenizer and EOS ids included."""
    tokens = list(range(4, 40))
    one, other = Reference(source).log_probs(tokens)[0], Reference(target).log_probs(tokens)[0]
    assert torch.equal(one, other)
    assert load_tokenizer(target).eos_ids == EOS_IDS
    assert read_architecture(target) == read_architecture(source)


def test_export_in_half_precision_says_so(directory, group, tmp_path):
    arch = read_architecture(directory)
    tensors = {name: torch.zeros(shape) for name, shape in local_shapes(arch, 1).items()}
    pieces = pieces_of(arch, 1, 0)
    load_pieces(directory, pieces, tensors)
    export_directory(directory, tmp_path / "out", arch, pieces, tensors, torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    source = load_file(directory / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, source[name].bfloat16()), name


@pytest.mark.parametrize("sizes", [(300_000, None), (None, 300_000)])
def test_a_second_export_replaces_the_first(directory, group, tmp_path, monkeypatch, sizes):
    """Shards and their index, then one file, and the other way round; a job that died may have left a part."""
    arch = read_architecture(directory)
    pieces = pieces_of(arch, 1, 0)
    target = tmp_path / "exported"
    target.mkdir()
    (target / "model.safetensors.part").touch()
    for value, shard_bytes in zip((1.0, 2.0), sizes, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(export, "SHARD_BYTES", shard_bytes or export.SHARD_BYTES)
            tensors = {name: torch.full(shape, value) for name, shape in local_shapes(arch, 1).items()}
            export_directory(directory, target, arch, pieces, tensors, torch.float32)
    found = {name: torch.zeros(shape) for name, shape in local_shapes(arch, 1).items()}
    load_pieces(target, pieces, found)
    assert all((piece.of_local(found) == 2.0).all() for piece in pieces)
    files = sorted(file.name for file in target.glob("*.safetensors*"))
    if sizes[1] is None:
        assert files == ["model.safetensors"]
    else:
        assert files[-1] == "model.safetensors.index.json"
        assert set(files[:-1]) == set(json.loads((target / files[-1]).read_text())["weight_map"].values())


def test_writers_take_turns_and_every_tensor_is_in_one_file(directory, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    shapes = hf_shapes(read_architecture(directory))
    shards = plan_shards(shapes, 4, [0, 8, 16])
    assert [name for shard in shards for name in shard.names] == list(shapes)
    assert [shard.writer for shard in shards][:4] == [0, 8, 16, 0]
    assert len({shard.file for shard in shards}) == len(shards) > 4
    assert all(shard.size <= 100_000 or len(shard.names) == 1 for shard in shards)


def test_a_place_that_cannot_be_written_is_one_line(directory, group, tmp_path):
    arch, place = read_architecture(directory), tmp_path / "a file" / "policy"
    place.parent.write_text("")
    with pytest.raises(ConfigError, match=r"policy: cannot be written by rank 0: Not a directory"):
        export_directory(directory, place, arch, [], {}, torch.float32)


def test_the_model_itself_is_no_target(directory, group, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(ConfigError, match=r"link: found the model's own directory as the target of an export"):
        export_directory(directory, tmp_path / "link", read_architecture(directory), [], {}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_need_scales_are_refused(directory, dtype):
    """Copied as plain numbers they would load, and mean nothing."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    kind = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}[dtype]
    message = rf"model\.safetensors: tensor {name} has dtype {kind}, expected one of F64, F32, F16, BF16$"
    with pytest.raises(ConfigError, match=message):
        check_weights(directory, read_architecture(directory))


@pytest.mark.parametrize("tp", [1, 2])
def test_names_of_transformer_engine(directory, tp):
    """It fuses the norms into the linear layers behind them; the pieces are those of the norms apart."""
    arch = read_architecture(directory)
    fused = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    for apart, name in fused.items():
        local = f"0.decoder.layers.1.{name}"
        found = list(parameter_pieces(arch, f"decoder.layers.1.{name}", local, (arch.hidden,), 2, Place(tp - 1)))
        other = list(parameter_pieces(arch, f"decoder.layers.1.{apart}", local, (arch.hidden,), 2, Place(tp - 1)))
        hf_name = "input_layernorm" if apart.startswith("input") else "post_attention_layernorm"
        assert found == other == [Piece(f"model.layers.3.{hf_name}.weight", (0,), (arch.hidden,), local, (0,))]


def test_a_tensor_that_nobody_holds_is_an_error(directory, group):
    arch = read_architecture(directory)
    tensors = {name: torch.zeros(shape) for name, shape in local_shapes(arch, 1).items()}
    pieces = [piece for piece in pieces_of(arch, 1, 0) if piece.tensor != "model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.mlp\.down_proj\.weight: 0 of"):
        list(gather_tensors(arch, pieces, tensors, torch.float32))


def test_loading_another_shape_names_the_tensor(directory):
    arch = read_architecture(directory)
    raw = json.loads((directory / "config.json").read_text()) | {"intermediate_size": 64}
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.0\.mlp\.gate(_up)?_proj\.weight has shape"):
        check_weights(directory, read_architecture(directory))
    assert arch.ffn == 256
