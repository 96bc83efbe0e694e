"""Many wrong inputs, each one line and status 2 before a model is built; writes docs/wrong_inputs.md anew on request.

WRITE_WRONG_INPUTS=1 python -m pytest tests/e2e/test_wrong_inputs.py
"""

import json
import os
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import yaml
from models import make_model, write_prompts

from treepo_mcore.config import ConfigError, load_config
from treepo_mcore.plan.dry_run import dry_run

PAGE = Path(__file__).parents[2] / "docs" / "wrong_inputs.md"
HEAD = """# Wrong inputs

What `treepo-mcore train CONFIG … --dry-run` says to each, with status 2 and before a model is built; `DIR` is the run's
folder. Written by `WRITE_WRONG_INPUTS=1 python -m pytest tests/e2e/test_wrong_inputs.py`; seconds are of a process that
has its libraries loaded.

| input | line | seconds |
|---|---|---|
"""

# On the command line.
OVERRIDES = [
    "",
    "rollout.temprature=1",
    "rollout.tree.widht=4",
    "trainer.step=3",
    "run.directory=x",
    "nothing.at.all=1",
    "advantage.estimator_name=grpo",
    "rollout.engine.max_num_seq=8",
    "rollout.engine.dtype=float32",
    "rollout.engine.hf_overrides={}",
    "rollout.engine.block_size=7",
    "rollout.engine.block_size=large",
    "rollout.engine.quantization=awq",
    "rollout.engine.quantization=fp8_per_block",
    "rollout.engine.enable_expert_parallel=true",
    "actor.megatron.expert_model_parallel_size=2",
    "actor.megatron.moe_aux_loss_coeff=0.1",
    "actor.megatron.num_layer=2",
    "actor.megatron.hidden_size=64",
    "actor.megatron.attention_dropout=high",
    "actor.megatron.params_dtype=float99",
    "actor.megatron.fp8_recipe=unheard",
    "trainer.steps=many",
    "trainer.steps=-1",
    "trainer.steps=1.5",
    "trainer.max_seconds=0",
    "trainer.prompts_per_step=0",
    "trainer.prompts_per_update=99",
    "trainer.eval_samples=0",
    "trainer.keep_checkpoints=0",
    "trainer.keep_every=-1",
    "trainer.keep_best=-1",
    "trainer.max_rollbacks=-1",
    "run.start_from=nowhere",
    "comm.stuck_seconds=0",
    "actor.min_entropy=low",
    "reward.function=exactly",
    "reward.options={ignorecase: true}",
    "reward={function: exact, options: {ignorecase: true}}",
    "reward={function: numeric, options: {relative: small}}",
    "reward={function: format, options: {pattern: '('}}",
    "reward={function: judge}",
    "reward={function: judge, options: {url: u, model: m, key_variable: NO_SUCH_VARIABLE}}",
    "reward={function: code, timeout: 2}",
    "reward.components={form: {function: fromat}}",
    "reward.components={form: {function: format, weight: heavy}}",
    "reward.components={form: {function: format, weight: .inf}}",
    "reward.components={'two words': {function: format}}",
    "reward.concurrency=0",
    "data.train={}",
    "data.train={a: {path: prompts.jsonl, weight: 2}, b: {path: prompts.jsonl}}",
    "data.train={a: {path: prompts.jsonl, weight: 0}}",
    "data.train={a: {file: prompts.jsonl}}",
    "data.answer_from=hash",
    "data.answer_from=gsm8k",
    "data.overlong_prompts=centre",
    "data.overlap=forbid",
    "run.seed=-1",
    "run.seed=x",
    "run.log_level=loud",
    "run.trackers=[mlflow]",
    "run.trackers=[no_such_module:f]",
    "run.trackers=tensorboard",
    "model.path=",
    "model.path=/nowhere",
    "model.path=nobody/nothing-of-that-name",
    "data.train=nowhere.csv",
    "data.train=",
    "data.chat_template=sometimes",
    "data.chat_template_kwargs=[1]",
    "data.max_prompt_tokens=0",
    "data.max_prompt_tokens=2",
    "data.max_prompt_tokens=4000",
    "data.overlong_prompts=cut",
    "data.answer_key=solution",
    "data.prompt_key=question",
    "rollout.tp=0",
    "rollout.tp=3",
    "rollout.tp=two",
    "rollout.dtype=int8",
    "rollout.temperature=0",
    "rollout.temperature=.inf",
    "rollout.temperature=-1",
    "rollout.sampler=forest",
    "rollout.sampler=no_such_module:f",
    "rollout.tail_steps=-1",
    "rollout.agreement_every=0",
    "rollout.push_staging_mb=1",
    "rollout.unfinished=forget",
    "rollout.over_provision=1.5",
    "rollout.tree.width=0",
    "rollout.tree.width=1",
    "rollout.tree.segment_tokens=0",
    "rollout.tree.max_depth=0",
    "rollout.tree.max_response_tokens=0",
    "rollout.tree.expansion=sideways",
    "rollout.tree.branching.factor=0",
    "rollout.tree.branching.factor=[3, 2]",
    "rollout.tree.branching.first=[0, 2]",
    "rollout.tree.branching.first=[1, 2, 3]",
    "rollout.tree.branching.allocation=fair",
    "rollout.tree.branching.allocation=os:getcwd",
    "rollout.tree.branching.schedule=[]",
    "rollout.tree.branching.schedule=[[0.5, 8]]",
    "rollout.tree.branching.schedule=[[0, 8], [0.5, 4]]",
    "rollout.tree.branching.schedule=[[0, 2], [0.5, 4]]",
    "rollout.tree.branching.schedule=[[0, 2], [1.5, 8]]",
    "rollout.tree.branching.schedule=[[0, 2], [9, 8]]",
    "rollout.tree.branching.schedule=sometimes",
    "rollout.tree.branching.replan_every=0",
    "rollout.tree.stopping.boxed=maybe",
    "rollout.tree.stopping.repetition_count=1",
    "rollout.tree.fallback.candidates=anyone",
    "rollout.tree.fallback.cut=nowhere",
    "rollout.tree.pruning.min_mean_logprob=1",
    "rollout.tree.pruning.function=no_such_module:f",
    "rollout.tree.pruning.function=os:getcwd",
    "rollout.tree.pruning.function=json",
    "rollout.tree.early_stop.leaves=1",
    "rollout.tree.early_stop.leaves=3",
    "rollout.tree.early_stop.leaves=8",
    "rollout.tree.early_stop.min_chance=2",
    "rollout.tree.early_stop.leaves=2 rollout.tree.expansion=stop_and_fork",
    "rollout.tree.contrast.paths=4",
    "rollout.tree.contrast.cut=1",
    "rollout.tree.branching.schedule=auto reward.shuffle=true",
    "filter.longest_rest=-1",
    "filter.max_prompts_factor=0.5",
    "filter.patience=-1",
    "advantage.estimator=grpoo",
    "advantage.estimator=no_such_module:f",
    "advantage.baseline=kin",
    "advantage.estimator=subtree advantage.mass_loss_weight=false",
    "advantage.aggregation=median",
    "advantage.whiten=step",
    "advantage.max_levels=0",
    "actor.tp=0",
    "actor.tp=3",
    "actor.pp=5",
    "actor.vpp=2",
    "actor.dtype=float8",
    "actor.fp8=half",
    "actor.packing=tight",
    "actor.packing=no_such_module:f",
    "actor.micro_batch_tokens=4",
    "actor.attention=sparse",
    "actor.recompute=some",
    "actor.old_logprobs=guess",
    "actor.correction=tis",
    "actor.correction_threshold=1",
    "actor.max_mismatch=0",
    "actor.reference=disk",
    "actor.first_stage_layers=9",
    "actor.optimizer.lr=0",
    "actor.optimizer.lr=.nan",
    "actor.optimizer.lr=fast",
    "actor.optimizer.min_lr=1",
    "actor.optimizer.betas=[0.9]",
    "actor.optimizer.betas=[0.9, 7]",
    "actor.optimizer.lr_decay=exponential",
    "actor.optimizer.clip_grad=0",
    "actor.loss.form=cliip",
    "actor.loss.clip_low=2",
    "actor.loss.dual_clip=1",
    "actor.loss.kl_coef=0.1",
    "actor.loss.aggregation=mean",
    "memory.offload=[everything]",
    "memory.host_gib=0",
    "reward.function=maths",
    "reward.function=no_such_module:f",
    "reward.function=os.path:join",
    "reward.correct=-2",
    "reward.workers=0",
    "reward.timeout=0",
    "reward.memory_gib=0",
    "reward.failed=ignore",
    "reward.max_failed=2",
    "",
][1:-1]

TRAIN = {
    "no JSON": "{",
    "a list a line": "[1]",
    "no answer": '{"prompt": "w4"}',
    "answer null": '{"prompt": "w4", "answer": null}',
    "answer NaN": '{"prompt": "w4", "answer": NaN}',
    "answer blank": '{"prompt": "w4", "answer": " "}',
    "answer a list": '{"prompt": "w4", "answer": [1]}',
    "prompt blank": '{"prompt": "", "answer": "1"}',
    "prompt a number": '{"prompt": 3, "answer": "1"}',
    "half an emoji": '{"prompt": "w4 \\ud83d", "answer": "1"}',
    "an id twice": '{"id": 1, "prompt": "w4", "answer": "1"}\n{"id": 1, "prompt": "w5", "answer": "1"}',
    "messages as text": json.dumps({"prompt": '[{"role": "user", "content": "w4"}]', "answer": "1"}),
    "ends with an answer": json.dumps({"prompt": [{"role": "assistant", "content": "w4"}], "answer": "1"}),
    "empty": "",
}
CONFIG = {
    "architectures": "LlamaForCausalLM",
    "rms_norm_eps": "tiny",
    "hidden_size": None,
    "num_attention_heads": 0,
    "vocab_size": "330",
    "initializer_range": "0.02",
    "tie_word_embeddings": "no",
    "hidden_act": "gelu",
    "max_position_embeddings": "long",
    "rope_theta": "1e4",
    "rope_scaling": {"rope_type": "linear"},
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.0, "attention_factor": 1.0},
    "quantization_config": {"quant_method": "fp8"},
    "eos_token_id": "end",
    "mlp_bias": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration that passes a dry run, its model and its prompts."""
    place = tmp_path_factory.mktemp("wrong")
    model = make_model(place / "model", "qwen2")
    settings = {
        "run": {"dir": str(place / "run")},
        "model": {"path": str(model)},
        "data": {"train": str(write_prompts(place / "train.jsonl", 4)), "max_prompt_tokens": 16},
        "rollout": {"dtype": "float32", "tree": {"width": 8, "segment_tokens": 8, "max_depth": 2}},
        "actor": {"dtype": "float32"},
        "reward": {"function": "math"},
        "trainer": {"steps": 1, "prompts_per_step": 2, "prompts_per_update": 2},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    dry_run(load_config(place / "run.yaml"), 1, 1)
    return place


def cases(folder):
    """(what is wrong, arguments); files are made as they come."""
    for override in OVERRIDES:
        yield override, re.split(r" (?=[a-z_.]+=)", override)
    for name, text in TRAIN.items():
        file = folder / "bad.jsonl"
        file.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
        yield f"data.train: {name}", [f"data.train={file}"]
    for key, value in CONFIG.items():
        model = copied(folder)
        content = json.loads((model / "config.json").read_text())
        if key == "rope_theta":
            content.pop("rope_parameters", None)
        (model / "config.json").write_text(json.dumps(content | {key: value}))
        yield f"config.json: {key}: {json.dumps(value)}", [f"model.path={model}"]
    for name, spoil in FILES.items():
        model = copied(folder)
        spoil(model)
        yield f"model: {name}", [f"model.path={model}"]


def copied(folder):
    model = folder / "broken"
    shutil.rmtree(model, ignore_errors=True)
    return Path(shutil.copytree(folder / "model", model))


def _header(model, header):
    raw = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


FILES = {
    "config.json is a list": lambda model: (model / "config.json").write_text("[]"),
    "config.json is cut": lambda model: (model / "config.json").write_text('{"a'),
    "config.json is missing": lambda model: (model / "config.json").unlink(),
    "weights are cut": lambda model: (model / "model.safetensors").write_bytes(b"12345678901234567890"),
    "weights' header is a list": lambda model: _header(model, [1]),
    "weights' header has a number": lambda model: _header(model, {"a": 1}),
    "weights are a pointer of git-lfs": lambda model: (model / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    ),
    "tokenizer.json is no JSON": lambda model: (model / "tokenizer.json").write_text("{"),
}


def what_is_said(file, arguments):
    """The line of a `ConfigError`, as `main` prints it; None where there is none."""
    try:
        dry_run(load_config(file, arguments), 1, 1)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return f"a traceback:\n{type(error).__name__}: {error}"
    return None


def test_every_wrong_input_is_one_line_with_status_2(folder, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    rows, bad = [], []
    for name, arguments in cases(folder):
        begin = time.perf_counter()
        line = what_is_said(folder / "run.yaml", arguments)
        seconds = time.perf_counter() - begin
        if line is None or "\n" in line or seconds > 60:
            bad.append((name, line))
            continue
        told = line.replace(str(folder), "DIR").replace("|", "\\|")
        rows.append(f"| `{name.replace('|', '/')}` | {told} | {seconds:.2f} |\n")
    assert not bad, bad
    assert len(rows) >= 120
    if os.environ.get("WRITE_WRONG_INPUTS"):
        PAGE.write_text(HEAD + "".join(rows))
