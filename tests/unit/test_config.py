"""Configuration: errors that name the key, overrides, and a dump that reads back."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.config import AdvantageConfig, Config, ConfigError, dump_config, load_config, parse_config

SMALL = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def message(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("rollout.temprature=1", "rollout.temprature", "rollout.temperature"),
        ("rollout.tree.widht=4", "rollout.tree.widht", "rollout.tree.width"),
        ("actor.optimizer.learning=1", "actor.optimizer.learning", None),
        ("rolout.tp=2", "rolout", "rollout"),
        ("trainer.prompt_per_step=2", "trainer.prompt_per_step", "trainer.prompts_per_step"),
    ],
)
def test_unknown_key(file, override, key, nearest):
    text = message(file, override)
    assert f"unknown key {key}" in text
    assert str(file) in text
    if nearest:
        assert text.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("rollout.tp=two", "rollout.tp", "'two'"),
        ("actor.optimizer.lr=fast", "actor.optimizer.lr", "'fast'"),
        ("actor.optimizer.lr=0", "actor.optimizer.lr", "0"),
        ("rollout.tree=3", "rollout.tree", "3"),
        ("actor.dtype=float8", "actor.dtype", "'float8'"),
        ("trainer.steps=1.5", "trainer.steps", "1.5"),
        ("model.path=", "model.path", "None"),
    ],
)
def test_wrong_type_or_value(file, override, key, found):
    text = message(file, override)
    assert f"{key}:" in text
    assert text.endswith(f"found {found}")


def test_missing_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\n")
    assert message(path).endswith("missing key data")


def test_a_path_has_to_fit_a_packed_sequence(file):
    text = message(file, "data.max_prompt_tokens=2048", "actor.micro_batch_tokens=8192")
    assert "actor.micro_batch_tokens: 8192 is less than the longest path" in text
    assert text.endswith("= 9216")


@pytest.mark.parametrize("option", ["aggregation: group_size", "include_root: false", "max_levels: 3"])
def test_options_of_another_estimator_are_refused(option):
    """They would change nothing, and a comparison would say so."""
    options = yaml.safe_load(option)
    name, value = next(iter(options.items()))
    assert getattr(AdvantageConfig(**options), name) == value
    with pytest.raises(ValueError, match=rf"{name}: {value} is of estimator: treepo, found estimator: grpo"):
        AdvantageConfig(estimator="grpo", **options)
    AdvantageConfig(estimator="grpo", mass_loss_weight=True, whiten="none")


def test_updates_larger_than_a_step_are_refused(file):
    text = message(file, "trainer.prompts_per_step=4", "trainer.prompts_per_update=8")
    assert "trainer.prompts_per_update: 8" in text


def test_overrides_are_yaml_values_at_dotted_keys(file):
    config = load_config(
        file,
        [
            "rollout.tree.width=4",
            "rollout.tree.branching.factor=[2, 4]",
            "rollout.engine={max_num_seqs: 8}",
            "rollout.engine.block_size=16",
            "actor.sequence_parallel=true",
            "actor.optimizer.lr=3e-4",
            "data.eval=null",
            "trainer.max_seconds=10",
            "rollout.tree.branching.first=3",
            "run.dir=a=b",
        ],
    )
    assert config.rollout.tree.width == 4
    assert config.rollout.tree.branching.factor == (2, 4)
    assert config.rollout.tree.branching.first == (3, 3)
    assert config.rollout.engine == {"max_num_seqs": 8, "block_size": 16}
    assert config.actor.sequence_parallel is True
    assert config.actor.optimizer.lr == 3e-4
    assert config.data.eval is None
    assert config.trainer.max_seconds == 10
    assert str(config.run.dir) == "a=b"


@pytest.mark.parametrize("override", ["rollout.tp", "=3"])
def test_an_override_without_key_and_value(file, override):
    assert message(file, override).startswith(f"override {override!r}: expected key=value")


def test_an_override_below_a_value(file):
    assert "path is a value, not a section" in message(file, "model.path.name=x")


def test_an_override_that_is_not_yaml(file):
    assert "not valid YAML" in message(file, "rollout.tp=[1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor.optimizer.min_lr=1", "actor.optimizer: min_lr: expected at most lr = 1e-06, found 1.0"),
        ("actor.optimizer.betas=[0.9, 7]", "actor.optimizer: betas: expected two numbers in [0, 1), found [0.9, 7.0]"),
    ],
)
def test_optimizer_settings_out_of_range(file, override, words):
    assert words in message(file, override)


@pytest.mark.parametrize("key", ["actor.optimizer.lr", "reward.failed", "rollout.temperature"])
@pytest.mark.parametrize("value", [".inf", ".nan", "1e999"])
def test_numbers_are_finite(file, key, value):
    assert message(file, f"{key}={value}").startswith(f"{file}: {key}: input should be ")


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "run.yaml"
    assert message(path) == f"{path}: no such configuration file"
    path.write_text("- a\n- b\n")
    assert "expected a mapping at the top, found list" in message(path)
    path.write_text("model: {path: m\n")
    assert "not valid YAML" in message(path)
    path.write_text("model: {path: m}\ndata: {train: t}\nmodel: {path: n}\n")
    assert message(path) == f"{path}: not valid YAML: model stands in line 1 and again in line 3"
    path.write_bytes(b"model: {path: \xff}\n")
    assert "not valid YAML" in message(path)


def test_sets_of_held_out_prompts(file):
    """What a set does not say is taken from the run; a resolved configuration reads back to an equal one."""
    sets = "data.eval={math: {path: a.jsonl, samples: 4}, hard: {path: b.jsonl, max_response_tokens: 9}}"
    config = load_config(file, [sets, "rollout.temperature=0.7"])
    assert {name: (s.samples, s.temperature, s.max_response_tokens) for name, s in config.held_out.items()} == {
        "math": (4, 0.7, config.rollout.tree.response_tokens),
        "hard": (1, 0.0, 9),
    }
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert list(load_config(file, ["data.eval=one.jsonl"]).held_out) == [""]
    longer = "data.eval={long: {path: a.jsonl, max_response_tokens: 9999999}}"
    assert load_config(file, [longer]).longest_response == 9999999


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.eval={math: {path: a.jsonl, sampels: 4}}", "unknown key data.eval.math.sampels"),
        ("data.eval={math: {samples: 4}}", "missing key data.eval.math.path"),
        ("data.eval={'a/b': {path: a.jsonl}}", "data.eval.a/b"),
        ("data.eval={math: {path: a.jsonl, samples: 0}}", "data.eval.math.samples: "),
        (
            "data.eval={math: {path: a.jsonl, samples: 4, temperature: 0}}",
            "data.eval.math.temperature: 0 gives the same answer 4 times",
        ),
        ("comm.train_timeout_seconds=1801", "train_timeout_seconds: 1801 is more than init_timeout_seconds = 1800"),
        ("comm.engine_timeout_seconds=601", "engine_timeout_seconds: 601 is more than train_timeout_seconds = 600"),
        ("comm.silence_seconds=1", "comm.silence_seconds: input should be greater than or equal to 5, found 1"),
    ],
)
def test_held_out_sets_and_time_limits_that_cannot_be(file, override, words):
    assert words in message(file, override)


@settings(deadline=None)
@given(
    st.integers(1, 64),
    st.floats(0.1, 2, allow_nan=False),
    st.sampled_from(["tree", "flat"]),
    st.sampled_from(["none", "selective", "full"]),
    st.one_of(st.none(), st.integers(2, 4)),
)
def test_a_dump_reads_back_to_an_equal_configuration(width, temperature, sampler, recompute, vpp):
    config = parse_config(
        SMALL
        | {
            "rollout": {"sampler": sampler, "temperature": temperature, "tree": {"width": width}},
            "actor": {"recompute": recompute, "vpp": vpp, "megatron": {"recompute_modules": ["core_attn"]}},
        }
    )
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[]", "schedule: expected the prompt's width first, as [0, paths], found []"),
        ("[[0.3, 4]]", "schedule: expected the prompt's width first"),
        ("[[0, 4], [1.5, 16]]", "schedule: expected shares in (0, 1) or whole segments as depths, found [0.0, 1.5]"),
        ("[[0, 4], [-1, 16]]", "expected shares in (0, 1) or whole segments"),
        ("[[0, 4], [0.5, 8], [0.2, 16]]", "schedule: expected depths that rise, found [0.0, 0.5, 0.2]"),
        ("[[0, 8], [0.5, 4]]", "schedule: expected widths of 1 or more that rise, found [8, 4]"),
        ("[[0, 0], [0.5, 16]]", "expected widths of 1 or more that rise"),
        ("[[0, 4], [0.5, 8]]", "branching.schedule: expected a last width of width = 16, found 8"),
        ("[[0, 4], [14, 16]]", "branching.schedule: depth 14 lies behind max_response_tokens or max_depth"),
    ],
)
def test_planned_forks_that_cannot_be(file, value, words):
    assert words in message(file, f"rollout.tree.branching.schedule={value}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.tree.branching.first=1"], "expected two first paths or more, found 1"),
        (["advantage.mass_loss_weight=false"], "mass_loss_weight: estimator: subtree needs true, found false"),
        (["advantage.estimator=treepo", "advantage.baseline=kin"], "baseline: kin is of estimator: subtree"),
    ],
)
def test_weights_and_trees_that_subtree_cannot_have(file, overrides, words):
    wrong = ["advantage.estimator=subtree", "rollout.tree.branching.schedule=[[0, 4], [0.5, 16]]"]
    load_config(file, [*wrong, "actor.micro_batch_tokens=16384"])
    assert words in message(file, *["advantage.estimator=subtree", *overrides])


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_files_build_on_others(tmp_path):
    """Sections are merged, lists and values replaced; the base is named from the file's own folder."""
    (tmp_path / "bases").mkdir()
    written(
        tmp_path / "bases",
        first="model: {path: m}\ndata: {train: t}\nrollout: {tree: {width: 4, segment_tokens: 64}}\nactor: {tp: 2}\n",
        second="base: first.yaml\nrollout: {tree: {width: 8}}\n",
    )
    written(tmp_path, run="base: bases/second.yaml\nactor: {pp: 2}\n")
    config = load_config(tmp_path / "run.yaml", ["rollout.tree.max_depth=3"])
    tree = config.rollout.tree
    assert (tree.width, tree.segment_tokens, tree.max_depth) == (8, 64, 3)
    assert (config.actor.tp, config.actor.pp) == (2, 2)


def test_environment_variables_in_values(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "/models")
    written(tmp_path, run="model: {path: '${WHERE}/qwen'}\ndata: {train: t}\n")
    assert load_config(tmp_path / "run.yaml").model.path == "/models/qwen"
    assert load_config(tmp_path / "run.yaml", ["model.path=a-${WHERE}-b"]).model.path == "a-/models-b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: run.yaml\n", "run.yaml: base: builds on itself, by way of run.yaml"),
        ("base: 3\n", "run.yaml: base: expected the name of a file, found 3"),
        ("base: gone.yaml\n", "gone.yaml: no such configuration file"),
        (
            "model: {path: '${NOT_THERE}/qwen'}\ndata: {train: t}\n",
            "run.yaml: model: path: the environment has no variable NOT_THERE, which '${NOT_THERE}/qwen' needs",
        ),
    ],
)
def test_bases_and_variables_that_are_not_there(tmp_path, text, words):
    written(tmp_path, run=text)
    assert words in message(tmp_path / "run.yaml")


def test_the_command_shows_and_compares(tmp_path):
    written(
        tmp_path,
        one="model: {path: m}\ndata: {train: t}\nrollout: {engine: {max_num_seqs: 8}}\n",
        other="base: one.yaml\nactor: {optimizer: {lr: 0.1}}\nrollout: {engine: {block_size: 32}}\n",
    )
    one, other = str(tmp_path / "one.yaml"), str(tmp_path / "other.yaml")
    shown = CliRunner().invoke(app, ["config", "show", other, "trainer.steps=7"])
    assert shown.exit_code == 0
    config = parse_config(yaml.safe_load(shown.output))
    assert (config.trainer.steps, config.actor.optimizer.lr) == (7, 0.1)
    same, differs = (CliRunner().invoke(app, ["config", "diff", one, second, "--json"]) for second in (one, other))
    assert (same.exit_code, same.output) == (0, "{}\n")
    assert differs.exit_code == 1
    found = json.loads(differs.output)
    assert found == {"rollout.engine.block_size": [None, 32], "actor.optimizer.lr": [1e-06, 0.1]}
