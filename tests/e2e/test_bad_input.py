"""Bad input ends in one clear line and exit status 2, before a model is built (the list of issue 2)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from models import make_model, make_tokenizer, write_prompts
from reward_functions import last_number

from treepo_mcore.actor.model import megatron_configs
from treepo_mcore.config import ActorConfig, ConfigError, OptimizerConfig, load_config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.data.prompts import PromptStream
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.trainer import Trainer
from treepo_mcore.tree.files import read_trees

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(autouse=True)
def _leave_the_job():
    """What is found after the processes have met is found in a job of one, which ends with the test."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


@pytest.fixture
def config(model, tmp_path):
    """A file that trains as it stands; every test breaks one thing."""
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model)},
        "data": {"train": str(write_prompts(tmp_path / "train.jsonl", 4)), "max_prompt_tokens": 16},
        "rollout": {"dtype": "float32", "tree": {"width": 8, "segment_tokens": 8, "max_depth": 2}},
        "filter": {"enabled": False},
        "actor": {"dtype": "float32"},
        "reward": {"function": "reward_functions:last_word_is_even"},
        "trainer": {"steps": 1, "prompts_per_step": 2, "prompts_per_update": 2, "save_trees_every": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def refused(file, *overrides):
    """The line, from the same calls as the command's."""
    with pytest.raises(ConfigError) as caught:
        Trainer(load_config(file, list(overrides)))
    assert not parallel_state.is_initialized(), "found only when models were built"
    text = str(caught.value)
    assert "\n" not in text
    return text


def command(file, *overrides, processes=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "treepo_mcore", "train", str(file), *overrides],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"},
    )


# Through the real command.


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.temprature=1", "error: {file}: unknown key rollout.temprature; did you mean rollout.temperature?"),
        ("trainer.steps=many", "error: {file}: trainer.steps: input should be a valid integer, * found 'many'"),
        ("data.train=nowhere.jsonl", "error: nowhere.jsonl: no such file"),
        (
            "actor.tp=2",
            "error: actor.tp x actor.cp x actor.pp = 2 x 1 x 1: 1 processes are not a multiple of 2; start torchrun *",
        ),
    ],
)
def test_the_command_prints_one_line_and_exits_with_2(config, override, line):
    result = command(config, override)
    assert result.returncode == 2, result.stderr
    assert fnmatch(result.stderr.strip(), line.replace("{file}", str(config)))
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (config.parent / "run").exists()


def test_processes_that_do_not_fill_the_layout_under_torchrun(config):
    result = command(config, "actor.pp=4", processes=2)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines[0].startswith(
        "error: actor.tp x actor.cp x actor.pp = 1 x 1 x 4: 2 processes are not a multiple of 4;"
    )
    # On a slow machine torchrun may not have ended the other rank before that says the same.
    assert len({line.split(": ", 1)[1] for line in lines}) == 1
    assert "ConfigError" not in result.stderr  # that is, no traceback but torchrun's own


# Layouts.


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor.tp=3", "actor.tp: 3 does not divide the model's attention heads of 4"),
        ("actor.pp=3", "actor: Megatron-Core refuses this: "),
        ("actor.first_stage_layers=1", "actor: Megatron-Core refuses this: "),
        ("rollout.tp=3", "rollout.tp: 3 does not divide the model's attention heads of 4"),
        ("rollout.tree.max_depth=64", "= 528 is more than the model's max_position_embeddings = 256"),
        ("actor.sequence_parallel=true", "actor.sequence_parallel: needs actor.tp > 1"),
        ("rollout.engine.max_num_seqs=many", "rollout: vLLM refuses this: "),
        ("rollout.engine.kv_cache_dtype=int3", "rollout: vLLM refuses this: "),
        ("actor.vpp=2", "actor.vpp: virtual pipeline stages need actor.pp > 1"),
        ("rollout.engine.nnodes=2", "rollout: vLLM refuses this: "),
    ],
)
def test_layouts_that_megatron_or_vllm_refuse(config, override, words):
    assert words in refused(config, override)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 4},  # two KV heads
        {"pp": 2, "first_stage_layers": 1},
        {"pp": 2, "last_stage_layers": 3},
        {"pp": 2, "vpp": 2, "tp": 2, "sequence_parallel": True},
    ],
)
def test_layouts_that_only_look_odd_are_legal(model, layout):
    """They also run: tests/distributed/test_log_probs.py."""
    megatron_configs(ActorConfig.model_validate(layout), read_architecture(model))


# The model directory.


def broken_model(tmp_path, **values):
    directory = make_model(tmp_path / "broken", "qwen2")
    raw = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_safetensors_missing_or_truncated(config, tmp_path):
    directory = broken_model(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file}: truncated safetensors file" in refused(config, f"model.path={directory}")
    file.unlink()
    assert "neither model.safetensors nor" in refused(config, f"model.path={directory}")


def test_architecture_that_is_not_supported(config, tmp_path):
    directory = broken_model(tmp_path, architectures=["GPT2LMHeadModel"])
    text = refused(config, f"model.path={directory}")
    assert text.startswith(f"{directory}/config.json: architecture GPT2LMHeadModel; supported: ")


def test_model_that_is_not_there(config, tmp_path):
    assert "no such directory" in refused(config, f"model.path={tmp_path / 'nowhere'}")


def test_a_model_that_the_run_would_write_over(config, model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").symlink_to(model)
    assert "is where run.dir puts the trained policy" in refused(config)


# Prompts.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "w4", "answer": "1"}\n{"prompt": "w4"', "line 2: not valid JSON"),
        ('{"prompt": "w4", "answer": "1"}\n\n["w4"]\n', "line 3: expected a JSON object, found list"),
        ('{"prompt": "w4"}\n', "line 1: no 'answer', found prompt"),
        ('{"prompt": 7, "answer": "1"}\n', "line 1: expected prompt to be a string or a list of messages"),
        (json.dumps({"prompt": "w4 " * 17, "answer": "1"}), "line 1: the prompt has 17 tokens, data.max_prompt_tokens"),
    ],
)
def test_prompt_files(config, tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    for key in ("train", "eval"):
        text = refused(config, f"data.{key}={file}")
        assert text.startswith(f"{file}: ")
        assert words in text


def test_prompts_that_are_held_out_too(config, tmp_path):
    rows = [json.dumps({"prompt": f"w4 w{5 + n}", "answer": "1"}) + "\n" for n in range(3)]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(rows))
    held_out.write_text("".join(rows[1:]))
    said = f"{train}: 2 of 3 prompts are held out, too, in {held_out}"
    files = [f"data.train={train}", f"data.eval={held_out}"]
    assert refused(config, *files, "data.overlap=error") == f"{said}; expected none (data.overlap: error)"
    train.write_text("".join(rows[1:]))
    assert refused(config, *files).endswith(
        f"2 of 2 prompts are held out, too, in {held_out}; no prompts are left; data.overlap: keep trains on them"
    )
    sets = f"data.train={{a: {{path: {train}}}, b: {{path: {tmp_path / 'gone.jsonl'}}}}}"
    assert refused(config, sets) == f"{tmp_path / 'gone.jsonl'}: no such file"


def test_a_token_that_the_model_does_not_have(config, tmp_path):
    directory = make_model(tmp_path / "small", "qwen2", vocab_size=300)  # its tokenizer knows 330 words
    prompts = tmp_path / "words.jsonl"
    prompts.write_text(json.dumps({"prompt": "w4 w310", "answer": "1"}))
    text = refused(config, f"model.path={directory}", f"data.train={prompts}")
    assert text == "prompt words-0: token id 310 of the tokenizer, the model's vocabulary has 300 words"


def test_messages_that_the_chat_template_refuses(config, tmp_path):
    directory = broken_model(tmp_path)
    make_tokenizer(directory, template="{{ raise_exception('roles must alternate') }}")
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "w4 w5"}], "answer": "1"}))
    text = refused(config, f"model.path={directory}", f"data.train={file}")
    assert text.startswith(f"{file}: line 1: the chat template of {directory} refuses the messages: roles must")


def test_messages_without_a_chat_template(config, tmp_path):
    directory = broken_model(tmp_path)
    make_tokenizer(directory, template=None)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "w4 w5"}], "answer": "1"}))
    text = refused(config, f"model.path={directory}", f"data.train={file}")
    assert f"{directory}: the tokenizer has no chat template" in text
    assert "no chat template" in refused(config, f"model.path={directory}", "data.chat_template=always")


def test_a_run_continued_with_other_prompts(config):
    checkpoint = config.parent / "run" / "checkpoints" / "iter_0000003"
    stream = PromptStream([Prompt("a", [4], "w4", "1")], seed=7, shuffle=True)
    write_state(checkpoint, prompts=stream.state_dict())
    what = "cannot resume the prompts: run.seed: found 0, the checkpoint has 7; put it back, or start a new run.dir"
    assert refused(config) == what
    assert "rows and weights of data.train, by hash: found" in refused(config, "run.seed=7")


@pytest.mark.parametrize("start", [False, True])
def test_a_run_continued_with_another_optimizer_or_layout(config, start):
    checkpoint = config.parent / "run" / "checkpoints" / "iter_0000003"
    write_state(checkpoint)
    more = [f"run.start_from={checkpoint}", f"run.dir={config.parent / 'other'}"] if start else []
    text = refused(config, "actor.optimizer.betas=[0.9,0.95]", *more)
    assert text.startswith(f"actor.optimizer.betas: found [0.9, 0.95], {checkpoint} was made with [0.9, 0.999]")
    write_state(checkpoint, layout={"form": "dp_reshardable", "tp": 2, "pp": 1, "ep": 1, "etp": 1})
    text = refused(config, *more)
    assert text.startswith("actor.tp, actor.pp, actor.ep, actor.etp: found 1, 1, 1, 1; ")
    assert f"{checkpoint} was written while the run went on, and loads with 2, 1, 1, 1 alone" in text
    assert "`treepo-mcore checkpoint reshard` with these" in text


def test_a_start_that_is_no_checkpoint(config, tmp_path):
    assert f"{tmp_path / 'trainer_state.json'}: not the state of a run" in refused(config, f"run.start_from={tmp_path}")


def write_state(checkpoint, **more):
    """What a checkpoint of step 3 says of its run, which had the default optimizer."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("3")
    layout = {"form": "fully_reshardable", "tp": 1, "pp": 1}
    state = {"step": 3, "rollout": {}, "prompts": {}, "optimizer": OptimizerConfig().model_dump(mode="json")}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"layout": layout} | more))


def test_damaged_checkpoints(config):
    checkpoint = config.parent / "run" / "checkpoints" / "iter_0000003"
    write_state(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"step": ')
    assert f"{checkpoint / 'trainer_state.json'}: not the state of a run" in refused(config)
    (checkpoint / "trainer_state.json").unlink()
    assert "No such file" in refused(config)
    for state, words in (
        ("[1]", "not the state of a run: expected an object, found list"),
        ('{"step": 3}', "has no prompts, as one of an earlier version of this package"),
        ('{"step": "three"}', "step: expected int, found three"),
    ):
        (checkpoint / "trainer_state.json").write_text(state)
        assert f"{checkpoint / 'trainer_state.json'}: {words}; run.resume: false begins anew" == refused(config)
    tracker = checkpoint.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text("release")
    assert refused(config) == f"{tracker}: expected the step of a checkpoint, found 'release'"


def test_run_dirs_that_cannot_be(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(config, f"run.dir={tmp_path}/file") == f"run.dir: {tmp_path}/file is a file, expected a directory"
    assert "is a file" in refused(config, f"run.dir={tmp_path}/file/below")


# Pass-through.


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "rollout.engine.max_num_seq=8",
            "unknown key rollout.engine.max_num_seq; did you mean rollout.engine.max_num_seqs?",
        ),
        ("rollout.engine.block_size=7", "rollout.engine.block_size: expected a multiple of 16, found 7"),
        (
            "rollout.engine.tensor_parallel_size=2",
            "rollout.engine.tensor_parallel_size: set by the trainer; use rollout.tp",
        ),
        ("rollout.engine.dtype=float16", "use rollout.dtype"),
        ("rollout.engine.seed=1", "use run.seed"),
        ("rollout.engine.quantization=fp8", "quantization: found fp8, pushes know fp8_per_block"),
        ("rollout.engine.quantization=fp8_per_block", "rollout.dtype: float32 with quantization fp8_per_block"),
        ("actor.megatron.recompute_module=[mlp]", "did you mean actor.megatron.recompute_modules?"),
        (
            "actor.megatron.sequence_parallel=true",
            "actor.megatron.sequence_parallel: set by the trainer; use actor.sequence",
        ),
        ("actor.megatron.lr=1", "use actor.optimizer.lr"),
        ("actor.megatron.hidden_size=64", "use model.path"),
        ("actor.megatron.overlap_grad_reduce=3", "actor.megatron.overlap_grad_reduce: input should be a valid boolean"),
        ("actor.megatron.bucket_size=many", "actor.megatron.bucket_size: input should be a valid integer"),
        ("actor.megatron.bucket_size=true", "actor.megatron.bucket_size: input should not be a boolean, found True"),
        ("actor.megatron.recompute_modules=3", "actor.megatron.recompute_modules: input should be a valid list"),
        ("actor.megatron.grad_scale_func=x", "actor.megatron.grad_scale_func: input should be callable"),
        ("actor.megatron.exp_avg_dtype=half8", "actor.megatron.exp_avg_dtype: expected the name of a torch dtype"),
        ("actor.megatron.optimizer=sgd", "actor.megatron.optimizer: set by the trainer"),
        ("actor.megatron.softmax_scale=0.1", "the engine would sample from another model"),
        ("actor.megatron.window_size=[16,0]", "the engine would sample from another model"),
        ("rollout.engine.hf_overrides={rope_theta: 5}", "the engine would sample from another model"),
        ("rollout.engine.max_model_len=8", "rollout.engine.max_model_len: set by the trainer; use data.max_prompt"),
    ],
)
def test_pass_through_keys(config, override, words):
    assert words in refused(config, override)


def test_overlapped_gathers_need_the_distributed_optimizer(config):
    overlap = ("actor.megatron.overlap_param_gather=true", "actor.megatron.overlap_grad_reduce=true")
    text = refused(config, *overlap, "actor.optimizer.distributed=false")
    assert text == "actor.megatron.overlap_param_gather: needs actor.optimizer.distributed"


def test_heads_that_an_engine_cannot_share(config, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}
    directory = make_model(tmp_path / "heads", "qwen2", **sizes, head_dim=16)
    text = refused(config, f"model.path={directory}", "rollout.tp=3")
    assert text == "rollout.tp: 3 and the model's 2 key/value heads: neither divides the other"


def test_fp8_of_shards_that_are_not_whole_blocks(config):
    fp8 = ("rollout.engine.quantization=fp8_per_block", "rollout.dtype=bfloat16")
    text = refused(config, *fp8, "rollout.tp=4")
    assert "rollout.engine.quantization: model.layers.0.self_attn.o_proj.weight has 32 columns on a rank" in text


def test_pass_through_reaches_all_three_classes_of_megatron(model):
    settings = {"recompute_modules": ["mlp"], "adam_beta1": 0.5, "bucket_size": 1000, "decoupled_lr": "1e-5"}
    with pytest.raises(ConfigError, match=r"actor\.optimizer\.betas"):
        megatron_configs(ActorConfig(megatron=settings), read_architecture(model))
    del settings["adam_beta1"]
    configs = megatron_configs(
        ActorConfig(megatron=settings | {"log_num_zeros_in_grad": True}), read_architecture(model)
    )
    assert configs.transformer.recompute_modules == ["mlp"]
    assert configs.ddp.bucket_size == 1000
    assert configs.optimizer.log_num_zeros_in_grad is True
    assert configs.optimizer.decoupled_lr == 1e-5  # which YAML takes for a string


# Functions of the user.


@pytest.mark.parametrize("name", ["reward_functions:nothing", "no_such_module:f", "nonsense"])
def test_pruning_function_that_does_not_exist(config, name):
    assert refused(config, f"rollout.tree.pruning.function={name}").startswith("rollout.tree.pruning.function: ")


@pytest.mark.parametrize("key", ["reward", "rollout.tree.pruning"])
def test_a_module_that_fails_while_it_is_imported(config, tmp_path, monkeypatch, key):
    (tmp_path / f"bad_{key[0]}.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = refused(config, f"{key}.function=bad_{key[0]}:f")
    assert text.startswith(f"{key}.function: cannot import")
    assert "SyntaxError" in text


@pytest.mark.parametrize("name", ["reward_functions:nothing", "no_such_module:f", "nonsense"])
def test_reward_function_that_does_not_exist(config, name):
    assert refused(config, f"reward.function={name}").startswith("reward.function: ")


def test_rewards_that_raise_hang_or_die_are_contained_and_counted(config):
    result = command(
        config, "reward.function=reward_functions:mostly_fails", "reward.timeout=0.3", "reward.max_failed=1"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = config.parent / "run"
    leaves = [leaf for tree in read_trees(run / "trees" / "step_000000") for leaf in tree.leaves]
    failed = [leaf for leaf in leaves if last_number(leaf.text) % 4 != 3]
    assert len(leaves) == 16
    assert 0 < len(failed) < 16
    assert all(leaf.failed and leaf.correct is False and leaf.score == leaf.reward == -1.0 for leaf in failed)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(row["reward/failed"] for row in rows if "reward/failed" in row) == len(failed)


def test_a_checker_that_mostly_fails_stops_the_run_by_name(config):
    result = command(config, "reward.function=reward_functions:mostly_fails", "reward.timeout=0.3")
    assert result.returncode == 1
    assert re.search(
        r"RewardError: step 0: \d+ of 16 calls of reward.function failed .* reward.max_failed = 0.2", result.stderr
    )
