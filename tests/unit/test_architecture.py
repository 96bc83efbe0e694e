"""Model directories: what is refused and in which words, and rotary frequencies in both spellings."""

import json
import struct

import pytest
import torch
from models import LLAMA3, YARN, make_model
from transformers import AutoModelForCausalLM

from treepo_mcore.config import ConfigError, ModelConfig
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.model.architecture import ask_transformers, read_architecture
from treepo_mcore.model.decoder import Q_NORM, QKV_BIAS
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.files import resolve_model, weight_files, weight_headers
from treepo_mcore.weights.hf import check_weights


@pytest.fixture
def directory(tmp_path):
    return make_model(tmp_path / "model", "qwen2", tokenizer=False)


def edit(directory, remove=(), **values):
    """Change config.json."""
    file = directory / "config.json"
    raw = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in raw.items() if key not in remove}))
    return directory


def refused(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What config.json says.


def headers_of(directory):
    return weight_headers(weight_files(directory))


def test_sizes(directory):
    arch = read_architecture(directory)
    assert (arch.family, arch.hidden, arch.layers, arch.heads, arch.kv_heads) == ("qwen2", 128, 4, 4, 2)
    assert (arch.vocab, arch.head_dim, arch.queries_per_group) == (330, 32, 2)
    assert (parts_of(arch).holds(QKV_BIAS), parts_of(arch).holds(Q_NORM), arch.tied) == (True, False, False)


def test_head_dim_need_not_be_hidden_over_heads(tmp_path):
    arch = read_architecture(make_model(tmp_path, "qwen3", head_dim=64))
    assert arch.head_dim == 64
    assert len(arch.rope_inv_freq) == 32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM; supported: LlamaForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, "sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
    ],
)
def test_what_megatron_would_ignore_is_refused(directory, values, words):
    text = refused(read_architecture, edit(directory, **values))
    assert words in text
    assert f"{directory}/config.json" in text


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, "many", 0, True])
def test_sizes_that_are_missing_or_no_numbers(directory, key, value):
    text = refused(read_architecture, edit(directory, **{key: value}))
    assert text == f"{directory}/config.json: expected {key} to be a positive number, found {value!r}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_key_value_heads": 3}, "expected num_key_value_heads to divide 4, found 3"),
        ({"head_dim": 33}, "expected heads of an even size, found head_dim 33"),
        (
            {"hidden_size": 2, "head_dim": None},
            "of an even size, found head_dim 0",
        ),
        ({"num_hidden_layers": 10**9}, "expected num_hidden_layers to be at most 10000, found 1000000000"),
        ({"vocab_size": 10**400}, "expected vocab_size to be a positive number, found 1000"),
        ({"rms_norm_eps": 10**400}, "expected rms_norm_eps to be a positive number, found 1000"),
        ({"model_type": "llama"}, "expected model_type to be 'qwen2', found 'llama'"),
        ({"layer_types": "full_attention"}, "expected layer_types to be a list of names, found 'full_attention'"),
    ],
)
def test_values_that_do_not_fit(directory, values, words):
    assert words in refused(read_architecture, edit(directory, **values))


@pytest.mark.parametrize("values", [{"use_cache": "yes"}, {"bos_token_id": "1"}, {"eos_token_id": {}}])
def test_keys_that_only_transformers_reads(directory, values):
    assert "config.json: transformers refuses this: " in refused(ask_transformers, edit(directory, **values))


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_sizes_that_may_be_null_and_nothing_else(directory, key):
    read_architecture(edit(directory, **{key: None}))
    text = refused(read_architecture, edit(directory, **{key: "4"}))
    assert text == f"{directory}/config.json: expected {key} to be a positive number, found '4'"


def test_files_that_hold_something_else(directory):
    (directory / "config.json").write_text("[1]")
    assert refused(read_architecture, directory) == f"{directory}/config.json: expected a JSON object, found list"
    index = directory / "model.safetensors.index.json"
    index.write_text("{}")
    assert refused(headers_of, directory) == f"{index}: expected a weight_map from tensors to files, found None"


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),  # Qwen2.5's recipe
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        (LLAMA3, 256),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_longest_sequence_of_a_scaled_rotary_embedding(directory, rope, longest, spelling):
    """As vLLM derives it."""
    other = {"rope_parameters": None, "rope_scaling": None}
    edit(directory, **other | {spelling: rope | {"rope_theta": 1e4}})
    assert read_architecture(directory).max_positions == longest


def test_qwen3_where_the_keys_are_absent(tmp_path):
    made = make_model(tmp_path, "qwen3", head_dim=128, tokenizer=False)
    arch = read_architecture(edit(made, remove=("head_dim", "tie_word_embeddings")))
    assert (arch.head_dim, arch.tied) == (128, False)


def test_attention_bias_of_other_families_is_refused(tmp_path):
    text = refused(read_architecture, edit(make_model(tmp_path, "llama"), attention_bias=True))
    assert "biases on llama attention" in text


def test_phi3_with_longrope_or_a_part_of_the_head_rotated_is_refused(tmp_path):
    rope = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    made = make_model(tmp_path, "phi3")
    assert "rope type 'longrope'" in refused(
        read_architecture, edit(made, rope_scaling=rope, remove=["rope_parameters"])
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert "partial_rotary_factor 0.75" in refused(
        read_architecture, edit(made, rope_parameters=rope, remove=["rope_scaling"])
    )


def test_a_sliding_window_that_no_layer_uses_is_fine(directory):
    edit(directory, use_sliding_window=True, layer_types=["full_attention"] * 4)
    assert read_architecture(directory).layers == 4


def test_config_json_missing_or_broken(directory):
    (directory / "config.json").write_text("{")
    assert "not valid JSON" in refused(read_architecture, directory)
    (directory / "config.json").unlink()
    assert refused(read_architecture, directory) == f"{directory}/config.json: missing"


# Rotary embeddings.

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "yarn": YARN,
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_both_spellings_of_the_rotary_embedding_mean_the_same(name, family, tmp_path):
    rope = ROPES[name]
    new = make_model(tmp_path / "new", family, rope_parameters=rope, tokenizer=False)
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    old = make_model(tmp_path / "old", family, rope_parameters=rope, tokenizer=False)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    edit(
        old,
        remove=["rope_parameters"],
        rope_theta=rope["rope_theta"],
        rope_scaling=None if name == "default" else scaling,
    )
    one, other = read_architecture(new), read_architecture(old)
    assert one.rope_inv_freq == other.rope_inv_freq
    assert one.rope_scale == other.rope_scale
    assert (one.rope_scale != 1) == (name == "yarn")
    rotary = AutoModelForCausalLM.from_pretrained(old).model.rotary_emb
    torch.testing.assert_close(torch.tensor(one.rope_inv_freq), rotary.inv_freq, rtol=0, atol=0)
    assert one.rope_scale == rotary.attention_scaling


def test_the_older_name_of_the_rope_type(directory):
    edit(directory, remove=["rope_parameters"], rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    plain = 1 / 1e4 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(torch.tensor(read_architecture(directory).rope_inv_freq), plain / 2)


# Weight files.


def test_truncated(directory):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for size, words in ((len(content) - 10, f"expected {len(content)}"), (100, "header alone"), (3, "truncated")):
        file.write_bytes(content[:size])
        text = refused(headers_of, directory)
        assert f"{file}: truncated safetensors file" in text
        assert words in text


def test_header_that_is_no_json(directory):
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 16) + b"x" * 64)
    assert refused(headers_of, directory).startswith(f"{file}: not a safetensors file")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([1], "expected an object as its header, found [1]"),
        ({"a": 3}, "tensor a: expected dtype, shape and data_offsets, found 3"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "tensor a: expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, "tensor a: expected dtype, shape"),
    ],
)
def test_header_of_another_form(directory, header, words):
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"0000")
    assert words in refused(headers_of, directory)


@pytest.mark.parametrize("offsets", [[0, 3], [4, 4], [8, 0]])
def test_a_header_whose_offsets_do_not_fit(directory, offsets):
    arch = read_architecture(directory)
    raw = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"00000000")
    assert f"{directory}/model.safetensors: not a safetensors file: " in refused(check_weights, directory, arch)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_git_lfs_leaves_in_the_place_of_a_file(directory, name):
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    reader = {"model.safetensors": headers_of, "config.json": read_architecture, "tokenizer.json": load_tokenizer}[name]
    assert (
        refused(reader, directory)
        == f"{directory / name}: a pointer of git-lfs, not the file; fetch it with: git lfs pull"
    )


def test_a_single_file_beside_an_index_that_does_not_name_it(sharded):
    (sharded / "model.safetensors").write_bytes(next(sharded.glob("model-*.safetensors")).read_bytes())
    assert "both model.safetensors and model.safetensors.index.json, which does not name it" in refused(
        headers_of, sharded
    )


def test_missing(directory):
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(headers_of, directory)


@pytest.fixture
def sharded(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="1MB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory


def test_index_that_names_a_missing_file(sharded):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert refused(headers_of, sharded) == f"{gone}: missing weight file"


def test_index_that_places_a_tensor_wrongly(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name, holder = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != holder)
    index["weight_map"][name] = other
    file.write_text(json.dumps(index))
    assert f"{sharded / other}: the index places {name} here" in refused(headers_of, sharded)


def test_shape_that_config_json_does_not_imply(directory):
    arch = read_architecture(edit(directory, intermediate_size=512))
    text = refused(check_weights, directory, arch)
    assert "has shape" in text
    assert "config.json implies" in text


def test_tensor_that_is_missing(directory):
    arch = read_architecture(edit(directory, num_hidden_layers=5))
    assert "tensor model.layers.4.input_layernorm.weight is missing" in refused(check_weights, directory, arch)


def test_complete_directories_pass(directory, sharded):
    assert len(check_weights(sharded, read_architecture(sharded))) == 4 * 12 + 3


# Hub names.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache made by hand that holds org/model at main and at a tag."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--org--model"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        make_model(repository / "snapshots" / commit, "qwen2", tokenizer=False)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots"


def test_hub_name_from_the_cache(hub_cache):
    assert resolve_model(ModelConfig(path="org/model")) == hub_cache / ("a" * 40)
    assert resolve_model(ModelConfig(path="org/model", revision="v1")) == hub_cache / ("b" * 40)
    assert read_architecture(resolve_model(ModelConfig(path="org/model"))).layers == 4


@pytest.mark.parametrize(("path", "revision"), [("org/other", None), ("org/model", "v2")])
def test_hub_name_that_is_not_in_the_cache(path, revision, hub_cache):
    text = refused(resolve_model, ModelConfig(path=path, revision=revision))
    assert f"model.path: {path} at revision {revision or 'main'}" in text
    assert "HF_HUB_OFFLINE is set" in text


@pytest.mark.parametrize("path", ["no/such/directory", "/no/such", "./missing", "missing"])
def test_path_that_is_not_there(path):
    assert f"model.path: {path}: no such directory" in refused(resolve_model, ModelConfig(path=path))
