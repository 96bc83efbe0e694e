"""FP8 recipes: what they set in Megatron's configuration, and refusals for machines that cannot run them."""

import pytest
from megatron.core.enums import Fp8Recipe
from models import SIZES

from treepo_mcore.actor.model import megatron_configs
from treepo_mcore.actor.precision import NEEDS, check_recipe, token_multiple
from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.rotary import Rotary
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.system.machine import Machine, numbers

HOPPER = Machine(capability=(9, 0), cuda=(13, 0), te=(2, 16, 1))
BLACKWELL = Machine(capability=(10, 0), cuda=(13, 0), te=(2, 16, 1))
CPU = Machine(cuda=(13, 0))


FP8_PARAMETERS = {"fp8_param": True, "fp8_param_gather": True}


def architecture(**changes):
    sizes = {
        "family": "llama",
        "hidden": SIZES["hidden_size"],
        "ffn": SIZES["intermediate_size"],
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "vocab": 330,
        "norm_eps": 1e-6,
        "tied": False,
        "max_positions": 256,
        "initializer_range": 0.02,
        "rope_inv_freq": (1.0,) * 16,
        "rope_scale": 1.0,
        "rotary": Rotary("default", 1e4),
    }
    return Architecture(**sizes | changes)


def configs(machine, arch=None, **settings):
    return megatron_configs(ActorConfig.model_validate(settings), arch or architecture(), machine)


def refusal(machine, arch=None, **settings):
    with pytest.raises(ConfigError) as caught:
        configs(machine, arch, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_recipe_of_megatron_is_known():
    assert set(NEEDS) == set(Fp8Recipe)


def test_bf16_is_the_default_and_sets_no_fp8():
    for machine in (CPU, HOPPER):
        assert configs(machine).transformer.fp8 is None
    assert token_multiple(vars(configs(HOPPER).transformer)) == 1


@pytest.mark.parametrize(
    ("name", "format_", "recipe", "multiple"),
    [("current", "hybrid", "tensorwise", 16), ("blockwise", "e4m3", "blockwise", 128)],
)
def test_named_recipes(name, format_, recipe, multiple):
    made = configs(HOPPER, fp8=name)
    transformer = made.transformer
    assert (transformer.fp8, transformer.fp8_recipe, transformer.first_last_layers_bf16) == (format_, recipe, True)
    assert made.optimizer.fp8_recipe == recipe  # the distributed optimizer looks at it, too
    assert made.te_layers
    assert token_multiple(vars(transformer)) == multiple


def test_settings_of_a_named_recipe_can_be_changed():
    made = configs(HOPPER, fp8="current", megatron={"num_layers_at_start_in_bf16": 2}).transformer
    assert (made.first_last_layers_bf16, made.num_layers_at_start_in_bf16) == (True, 2)
    assert not configs(
        HOPPER, fp8="current", megatron={"first_last_layers_bf16": False}
    ).transformer.first_last_layers_bf16


@pytest.mark.parametrize("name", ["current", "blockwise"])
def test_fp8_parameters_are_a_setting(name):
    made = configs(HOPPER, fp8=name, megatron=FP8_PARAMETERS)
    assert (made.transformer.fp8_param, made.ddp.fp8_param_gather) == (True, True)
    assert not configs(HOPPER, fp8=name).transformer.fp8_param


def test_other_recipes_pass_through():
    made = configs(HOPPER, megatron={"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024})
    assert (made.transformer.fp8_recipe, made.transformer.fp8_amax_history_len) == ("delayed", 1024)
    assert token_multiple(vars(configs(BLACKWELL, megatron={"fp8": "e4m3", "fp8_recipe": "mxfp8"}).transformer)) == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"megatron": {"fp8": "e4m3", "fp8_recipe": "tensor"}}, ["fp8_recipe", "tensorwise", "'tensor'"]),
        ({"megatron": {"fp8": "e5m2"}}, ["actor.megatron.fp8:", "'e4m3' or 'hybrid'", "'e5m2'"]),
        ({"megatron": {"fp8_recipe": "tensorwise"}}, ["no effect without actor.megatron.fp8"]),
        ({"fp8": "current", "megatron": {"fp8_recipe": "blockwise"}}, ["set by actor.fp8: current"]),
        ({"fp8": "current", "megatron": {"fp8_param": True}}, ["fp8_param, fp8_param_gather", "go together"]),
        ({"fp8": "blockwise", "megatron": {"fp8_param_gather": True}}, ["go together"]),
        ({"megatron": FP8_PARAMETERS}, ["actor.megatron.fp8_param:", "no effect without actor.megatron.fp8"]),
        ({"megatron": FP8_PARAMETERS | {"fp8": "hybrid"}}, ["tensorwise, blockwise", "found delayed"]),
        (
            {"fp8": "current", "megatron": FP8_PARAMETERS, "optimizer": {"distributed": False}},
            ["optimizer.distributed"],
        ),
        ({"fp8": "current", "megatron": FP8_PARAMETERS, "reference": "host"}, ["actor.reference: none"]),
        ({"fp8": "current", "dtype": "float32"}, ["actor.fp8: current", "bfloat16", "float32"]),
        ({"megatron": {"fp8": "hybrid", "first_last_layers_bf16": True}}, ["Delayed scaling"]),
    ],
)
def test_contradictions(settings, words):
    text = refusal(HOPPER, **settings)
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("key", ["current", "blockwise"])
def test_a_cpu_is_told_so(key):
    assert f"actor.fp8: {key}" in (text := refusal(CPU, fp8=key))
    assert "needs an NVIDIA GPU" in text


@pytest.mark.parametrize(
    ("recipe", "machine", "found"),
    [
        ("tensorwise", Machine((9, 0), (13, 0), None), "not installed"),
        ("tensorwise", Machine((9, 0), (13, 0), (2, 1)), "2.2 or newer, found 2.1"),
        ("tensorwise", Machine((8, 0), (13, 0), (2, 16)), "8.9 or higher, found 8.0"),
        ("blockwise", Machine((8, 9), (13, 0), (2, 16)), "9.0 or higher, found 8.9"),
        ("blockwise", Machine((9, 0), (12, 8), (2, 16)), "CUDA 12.9 or newer, found 12.8"),
        ("mxfp8", Machine((9, 0), (13, 0), (2, 16)), "10.0 or higher and below 12.0, found 9.0"),
        ("mxfp8", Machine((12, 0), (13, 0), (2, 16)), "below 12.0, found 12.0"),
        ("custom", Machine((9, 0), (13, 0), (2, 8)), "2.9 or newer, found 2.8"),
    ],
)
def test_machines_that_cannot(recipe, machine, found):
    with pytest.raises(ConfigError, match=f"key: the recipe {recipe} needs.*{found}"):
        check_recipe(Fp8Recipe(recipe), machine, "key")


@pytest.mark.parametrize(
    ("recipe", "machine"),
    [
        ("tensorwise", Machine((8, 9), (13, 0), (2, 2))),
        ("delayed", HOPPER),
        ("blockwise", HOPPER),
        ("mxfp8", BLACKWELL),
    ],
)
def test_machines_that_can(recipe, machine):
    check_recipe(Fp8Recipe(recipe), machine, "key")


def test_odd_widths_are_refused():
    assert "FFN width per rank must be a multiple of 16, found 8" in refusal(HOPPER, architecture(ffn=8), fp8="current")
    assert "found 24" in refusal(HOPPER, architecture(ffn=48), fp8="current", tp=2)


def test_fusions_follow_the_machine():
    cpu, gpu = configs(CPU).transformer, configs(HOPPER).transformer
    apex = configs(Machine((9, 0), (13, 0), (2, 16), fused_wgrad=True)).transformer
    assert not any([cpu.bias_activation_fusion, cpu.bias_dropout_fusion, cpu.gradient_accumulation_fusion])
    assert gpu.bias_activation_fusion
    assert gpu.bias_dropout_fusion
    assert (gpu.gradient_accumulation_fusion, apex.gradient_accumulation_fusion) == (False, True)


def test_fused_gradients_without_apex_are_refused_before_megatron_raises():
    text = refusal(HOPPER, megatron={"gradient_accumulation_fusion": True})
    assert "fused_weight_gradient_mlp_cuda" in text


def test_attention_kernels_of_the_other_device_are_refused():
    assert "actor.attention: chain" in refusal(HOPPER, attention="chain")
    assert "actor.attention: flex" in refusal(CPU, attention="flex")


@pytest.mark.parametrize(
    ("text", "found"), [("2.16.1+cu13", (2, 16, 1)), ("2.11.0a0", (2, 11, 0)), ("13.0", (13, 0)), ("", ()), ("x", ())]
)
def test_versions(text, found):
    assert numbers(text) == found
