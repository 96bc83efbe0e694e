"""The rotary embedding of config.json: what the actor and vLLM compute from it, key by key."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LLAMA3, make_model
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from treepo_mcore.config import ConfigError
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.model.rotary import read_rotary

HEAD = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@cache
def vllm_config():
    return VllmConfig()


def tables(rotary, positions=32):
    """Cosine and sine of the first positions, as the actor and as vLLM multiply queries and keys by them."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * rotary.inverse_frequencies(HEAD)
    ours = torch.cat([angles.cos(), angles.sin()], dim=-1) * rotary.scale
    with set_current_vllm_config(vllm_config()):
        rope = get_rope(HEAD, 128, rope_parameters=rotary.for_vllm(), dtype=torch.float32)
    return ours, rope.cos_sin_cache[:positions].float()


@st.composite
def ropes(draw):
    """Any settings that are supported, in either spelling."""
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    rope = {draw(st.sampled_from(["rope_type", "type"])): kind, "rope_theta": draw(st.sampled_from([1e4, 5e5, 1e6]))}
    if kind != "default":
        rope["factor"] = draw(st.one_of(st.floats(1.0, 40.0), st.sampled_from([1, 2, 8])))
    if kind == "llama3":
        low = draw(st.floats(0.5, 4.0))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 8.0))}
        rope["original_max_position_embeddings"] = draw(st.sampled_from([32, 64, 128]))
    optional = {
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "truncate": st.booleans(),
        "original_max_position_embeddings": st.sampled_from([32, 64, 128]),
        "mscale": st.floats(0.5, 2.0),
        "mscale_all_dim": st.floats(0.5, 2.0),
        draw(st.sampled_from(["attention_factor", "attn_factor"])): st.floats(0.5, 2.0),
        "extrapolation_factor": st.just(1.0),
    }
    for key in optional if kind == "yarn" else ():
        if draw(st.booleans()):
            rope[key] = draw(optional[key])
    return {"max_position_embeddings": 128, draw(st.sampled_from(["rope_parameters", "rope_scaling"])): rope}


@settings(max_examples=150, deadline=None)
@given(ropes())
def test_actor_and_engine_rotate_alike(raw):
    ours, theirs = tables(read_rotary("config.json", raw))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("more", "scale"),
    [
        ({}, 1.1386294361),
        ({"attn_factor": 0.8782488562869419}, 1.0),  # of a published distillation of Qwen3 8B
        ({"attention_factor": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707}, 1.1386294361),  # alone it says nothing
    ],
)
def test_the_factor_of_yarn(more, scale):
    rotary = read_rotary("config.json", {"rope_scaling": YARN | more})
    assert rotary.scale == pytest.approx(scale)
    ours, theirs = tables(rotary)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    other, _ = tables(replace(rotary, scale=rotary.scale * 1.1))
    assert not torch.allclose(other, theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (
            YARN | {"attention_factor": 1.0, "attn_factor": 1.0},
            "attention_factor and attn_factor: expected at most one of them",
        ),
        (YARN | {"extrapolation_factor": 0.5}, "extrapolation_factor 0.5; supported: 1.0"),
        (YARN | {"apply_yarn_scaling": False}, "apply_yarn_scaling False; supported: True"),
        (YARN | {"mrope_section": [8, 12, 12]}, "mrope_section of the yarn rotary embedding is not supported"),
        (YARN | {"truncate": "no"}, "truncate: expected true or false, found 'no'"),
        (YARN | {"factor": None}, "expected factor to be a positive number, found None"),
        (YARN | {"factor": 0.5}, "factor: expected 1 or more, found 0.5"),
        ({"rope_type": "linear"}, "expected factor to be a positive number, found None"),
        ({"rope_type": "llama3", "factor": 8.0}, "expected low_freq_factor to be a positive number, found None"),
        ({"rope_type": "default", "factor": 2.0}, "factor of the default rotary embedding is not supported"),
        ({"rope_type": "linear", "factor": "two"}, "expected factor to be a positive number, found 'two'"),
        ({"rope_type": ["yarn"]}, "rope type ['yarn']; supported: default, linear, llama3, yarn"),
        (YARN | {"type": "linear"}, "type: expected rope_type = 'yarn'"),
        (YARN | {"rope_theta": 1}, "rope_theta: expected more than 1, found 1"),
        (YARN | {"factor": 10**400}, "expected factor to be a positive number, found 1000"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor: expected more than low_freq_factor"),
        ({"rope_theta": "1e4"}, "expected rope_theta to be a positive number, found '1e4'"),
        ("yarn", "rope_scaling: expected an object, found 'yarn'"),
    ],
)
def test_what_one_side_would_read_otherwise_is_refused(rope, words):
    with pytest.raises(ConfigError) as caught:
        read_rotary("config.json", {"rope_scaling": rope})
    assert str(caught.value).startswith(f"config.json: {words}")


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_override_is_what_vllm_goes_by(family, tmp_path):
    """Also where the file says nothing, and vLLM's models have defaults of their own."""
    directory = make_model(tmp_path, family, tokenizer=False)
    config = json.loads((directory / "config.json").read_text())
    config.pop("rope_parameters", None)
    (directory / "config.json").write_text(json.dumps(config))
    wanted = read_rotary("config.json", config).for_vllm()
    found = ModelConfig(str(directory), skip_tokenizer_init=True, hf_overrides={"rope_parameters": wanted})
    assert found.hf_config.rope_parameters == wanted


def test_two_spellings_that_differ():
    other = {"type": "linear", "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling differ; expected one of the two"):
        read_rotary("config.json", {"rope_parameters": YARN, "rope_scaling": other})
    same = {"type": "yarn"} | {key: value for key, value in YARN.items() if key != "rope_type"}
    assert read_rotary("config.json", {"rope_parameters": YARN, "rope_scaling": same}).kind == "yarn"


def test_a_checkpoint_that_names_what_its_kind_does_not_read():
    rope = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1}
    assert read_rotary("config.json", {"rope_parameters": rope}).kind == "linear"


def test_phi3_takes_no_yarn(tmp_path):
    directory = make_model(tmp_path, "phi3", tokenizer=False)
    config = json.loads((directory / "config.json").read_text()) | {"rope_parameters": YARN}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config.json: rope type 'yarn'; supported: default$"):
        read_architecture(directory)
