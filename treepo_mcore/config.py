"""Typed configuration: YAML plus ``key=value`` overrides; an unknown key is an error that names the nearest one.

Every section is a pydantic model, so a field's comment and type are its documentation
(`docs/configuration.md` is written from them). Lengths are in tokens, times in seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

NEWEST_CHECKPOINT = "latest_checkpointed_iteration.txt"  # names one of run.checkpoints; Megatron-LM's name and content


class ConfigError(ValueError):
    """The configuration, or a file it names, cannot be used. The message is one line for a person."""


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
Holder = Literal["parameters", "gradients", "optimizer"]  # of the actor's memory
IntRange = Annotated[tuple[int, int], BeforeValidator(_pair)]  # "2" means (2, 2): inclusive bounds


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs/treepo")  # checkpoints, metrics.jsonl, trees/, the resolved configuration
    seed: int = Field(0, ge=0)
    deterministic: bool = False  # decisions follow logical time (engine steps), never the clock
    resume: bool = True  # continue from the newest checkpoint in `dir`
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    trackers: list[str] = []  # tensorboard, wandb or package.module:name; get the numbers of metrics.jsonl too

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.dir / "checkpoints"


class ModelConfig(Section):
    """The policy: a Hugging Face directory, or a hub name with its revision."""

    path: str = Field(min_length=1)
    revision: str | None = None


class DataConfig(Section):
    """Prompts: JSONL or parquet; `prompt` is a string or a list of chat messages."""

    train: Path
    eval: Path | None = None
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    # "auto": a message list goes through the tokenizer's chat template, a string is used as it stands;
    # "always": a string becomes one user message; "never": message lists are refused.
    chat_template: Literal["auto", "always", "never"] = "auto"
    system_prompt: str | None = None  # prepended as a system message where a chat template is applied
    max_prompt_tokens: int = Field(1024, ge=1)
    overlong_prompts: Literal["error", "drop"] = "error"
    shuffle: bool = True


class BranchingConfig(Section):
    """How many children, for whom (docs/algorithm.md 2.3 to 2.5)."""

    factor: IntRange = (2, 2)  # b, drawn per prompt and wave (all paths of one depth) when a range
    first: IntRange | None = None  # first-level divergence, drawn per prompt; default: `factor`
    # even: remainder to random survivors (the paper's best). low/high_logprob: softmax of the mean log-prob
    # of the last segment; the paper found neither better than even. Or package.module:name (docs/extending.md).
    allocation: str = "even"
    temperature: float = Field(2.0, gt=0)  # of that softmax
    temperature_end: float | None = Field(None, gt=0)  # half-cosine from `temperature` to this over the run

    @model_validator(mode="after")
    def _ranges(self) -> BranchingConfig:
        for name, pair in (("factor", self.factor), ("first", self.first)):
            if pair is not None and not 1 <= pair[0] <= pair[1]:
                raise ValueError(f"{name}: expected 1 <= low <= high, found {list(pair)}")
        return self


class StoppingConfig(Section):
    """When a path ends besides EOS, length and depth (docs/algorithm.md 3)."""

    # boxed: the token that closes a \boxed{...} ends the path. boxed_and_eos: a box marks a path that
    # also ended by EOS as finished. none: boxes are not looked for.
    boxed: Literal["none", "boxed", "boxed_and_eos"] = "boxed_and_eos"
    # A path ends when its last `repetition_count` x period tokens are periodic, with a period up to
    # `repetition_period`; 0 turns it off.
    repetition_count: int = Field(8, ge=0)
    repetition_period: int = Field(32, ge=1)
    repetition_min_tokens: int = Field(64, ge=1)  # and never on fewer repeated tokens than this

    @model_validator(mode="after")
    def _really_repeats(self) -> StoppingConfig:
        if self.repetition_count == 1:
            raise ValueError("repetition_count: expected 0 (off) or at least 2, found 1")
        return self


class FallbackConfig(Section):
    """Restarting from finished paths when live ones run out before W (docs/algorithm.md 2.7)."""

    # soft_boxed_and_eos: leaves that ended by a box or EOS. random_all: any leaf. Where there is none, the prompt.
    candidates: Literal["soft_boxed_and_eos", "random_all"] = "soft_boxed_and_eos"
    # Where on its path the new one begins: at any of the boundaries, before the least likely token, at the prompt.
    cut: Literal["random", "min_logprob_token", "from_start"] = "random"


class PruningConfig(Section):
    """Ending low-value paths early; they stay in the tree as leaves with the reason `pruned`."""

    min_mean_logprob: float | None = Field(None, lt=0)  # of the whole path so far, looked at on boundaries
    function: str | None = None  # "package.module:name", called with a `PathView`, True prunes


class TreeConfig(Section):
    """The shape of a tree."""

    width: int = Field(16, ge=1)  # W, leaves per prompt
    segment_tokens: int = Field(512, ge=1)  # L
    max_depth: int = Field(14, ge=1)  # D, segments per path
    max_response_tokens: int | None = Field(None, ge=1)  # default D x L
    branching: BranchingConfig = BranchingConfig()
    stopping: StoppingConfig = StoppingConfig()
    fallback: FallbackConfig = FallbackConfig()
    pruning: PruningConfig = PruningConfig()
    # fork_behind: the parent's request keeps decoding across boundaries, siblings start from the recorded
    # prefix. stop_and_fork: every path stops at every boundary (the released design), for comparison.
    expansion: Literal["fork_behind", "stop_and_fork"] = "fork_behind"

    @property
    def response_tokens(self) -> int:
        """Longest response, in tokens."""
        return min(
            self.max_response_tokens or self.max_depth * self.segment_tokens, self.max_depth * self.segment_tokens
        )


class RolloutConfig(Section):
    """Trees out of a colocated vLLM engine."""

    tp: int = Field(1, ge=1)  # tensor-parallel size of one engine; world size / tp engines run
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sampler: str = "tree"  # flat: W independent answers a prompt; or package.module:name
    temperature: float = Field(1.0, gt=0)  # nothing else changes the distribution: ratios compare the whole of it
    tree: TreeConfig = TreeConfig()
    # A phase ends in a tail, when an engine has room for another prompt and none is left to draw. After this many
    # of its steps in that state the engine gives up what is unfinished; default: never.
    tail_steps: int | None = Field(None, ge=0)
    # carry: such prompts come first in the next step, sampled anew, and are then left to finish.
    unfinished: Literal["carry", "drop"] = "carry"
    # Engine steps between two meetings: ranks of an engine compare what they sampled and look for new prompts; under
    # run.deterministic, engines wait for outstanding rewards and share what they know.
    agreement_every: int = Field(16, ge=1)
    # Buffer of the pushes of weights on every rank, in MiB: both directions and both halves together. Only what is used
    # is taken; 64 hold a row of FP8 blocks of the widest models.
    push_staging_mb: int = Field(256, ge=64)
    # Any argument of vLLM's EngineArgs. With `quantization: fp8_per_block` it computes in FP8; then weights are
    # quantised before they are sent.
    engine: dict[str, Any] = {}


class FilterConfig(Section):
    """Dynamic sampling (DAPO): prompts whose leaves all have the same score teach nothing and are replaced."""

    enabled: bool = True
    max_prompts_factor: float = Field(3.0, ge=1)  # draw at most this many times `prompts_per_step`
    patience: int = Field(10, ge=0)  # steps in a row without an informative prompt, then the run stops; 0: never


OF_TREEPO = (
    "aggregation",
    "reject_uniform_subgroups",
    "include_root",
    "leave_one_out",
    "distinct_groups",
    "mass_baseline",
    "max_levels",
)


class AdvantageConfig(Section):
    """Estimators over a tree's sub-groups (docs/algorithm.md 4; paper equations 5 to 7)."""

    # treepo, segment, spo, grpo, rloo, reinforce_pp_baseline, or package.module:name (docs/extending.md).
    estimator: str = "treepo"
    # The seven up to max_levels are of treepo, and refused under other estimators.
    aggregation: Literal["average", "group_size"] = "average"  # weight of the levels
    reject_uniform_subgroups: bool = False  # drop levels >= 1 whose leaves all agree (hurts: docs/algorithm.md 4.2)
    include_root: bool = True
    leave_one_out: bool = False
    distinct_groups: bool = False  # count each distinct set of leaves once
    mass_baseline: bool = False  # sub-group means weighted by path mass
    max_levels: int | None = Field(None, ge=1)  # levels used, the root's included; default: all
    mass_loss_weight: bool = False  # loss of leaf i times W m_i, in a mean with the same weights
    whiten: Literal["batch", "none"] = "batch"  # treepo, segment and reinforce_pp_baseline; the others never are
    whiten_shift: bool = True  # subtract the batch mean as well

    @model_validator(mode="after")
    def _options_of_the_estimator(self) -> AdvantageConfig:
        """An option that would change nothing is not accepted in silence."""
        for name in OF_TREEPO if self.estimator != "treepo" else ():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name}: {value} is of estimator: treepo, found estimator: {self.estimator}")
        return self


class LossConfig(Section):
    """The clipped policy loss (docs/algorithm.md 5)."""

    # What the token losses of a mini-batch are averaged over. token_mean: its tokens, each once per leaf (DAPO);
    # sequence_mean: leaves, of each leaf's mean (GRPO); fixed_length: leaves, of each leaf's sum divided by the
    # longest response allowed (Dr. GRPO).
    aggregation: Aggregation = "token_mean"
    form: str = "clip"  # of a token's loss: clip-higher with dual clip, or package.module:name (docs/extending.md)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float = Field(10.0, gt=1)
    entropy_coef: float = 0.0
    kl_coef: float = Field(0.0, ge=0)  # of the k3 estimate of the KL divergence to `actor.reference`


class OptimizerConfig(Section):
    """Adam, in Megatron's terms; anything else goes into `actor.megatron`."""

    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # in rollout steps
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, gt=0)
    distributed: bool = True  # Megatron's distributed optimizer

    @model_validator(mode="after")
    def _ranges(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: expected at most lr = {self.lr}, found {self.min_lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), found {list(self.betas)}")
        return self


class ActorConfig(Section):
    """The policy in Megatron-Core: sizes of the process grid and what an update costs."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    vpp: int | None = Field(None, ge=2)  # virtual pipeline stages per rank
    first_stage_layers: int | None = Field(None, ge=1)  # uneven pipelines
    last_stage_layers: int | None = Field(None, ge=1)
    sequence_parallel: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of parameters and activations
    # Linear layers in FP8, forward and backward, in the pass for log-probs too; needs TransformerEngine and a GPU that
    # has it. current: one scale a tensor; blockwise: one for 128 elements or 128 x 128. Both leave the first and the
    # last layer in bfloat16 (actor.megatron.first_last_layers_bf16, num_layers_at_start_in_bf16 and ..._at_end_...).
    # Other recipes of Megatron: actor.megatron.fp8 and fp8_recipe. Parameters that are FP8 themselves:
    # actor.megatron.fp8_param and fp8_param_gather, together (docs/gpu.md).
    fp8: Literal["none", "current", "blockwise"] = "none"
    packing: str = "tree"  # flat: every leaf its own copy of the prefix, for comparison; or package.module:name
    # Unique tokens of one packed sequence, at most; a pipeline with few sequences gets shorter ones, of whole trees.
    micro_batch_tokens: int = Field(8192, ge=1)
    attention: Literal["auto", "dense", "chain", "flex"] = "auto"  # auto: chain on a CPU, flex on a GPU
    recompute: Literal["none", "selective", "full"] = "none"
    # What ratios are taken against. recompute: a pass of the actor before the first update; engine: the log-probs that
    # came with the tokens, which saves that pass.
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    # For the mismatch of engine and actor, with the ratio rho = p(actor) / p(engine) of the old policy. tis: losses
    # times min(rho, threshold); mask: no loss where rho is outside [1 / threshold, threshold]. token: rho of each
    # token; sequence: the product along each leaf's response. With old_logprobs: engine, where rho is in the clipped
    # ratio already and is first known in the update, only token_mask.
    # Also package.module:name, a factor of each token from log rho (docs/extending.md).
    correction: str = "none"
    correction_threshold: float = Field(2.0, gt=1)
    max_mismatch: float | None = Field(None, gt=0)  # the run stops beyond this mean |log rho| of a mini-batch, in nats
    # The policy at the start of the run, for loss.kl_coef. host: its weights wait in host memory, the actor's size
    # once more, and change places with the actor's (another such copy) for its log-probs.
    reference: Literal["none", "host"] = "none"
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    megatron: dict[str, Any] = {}  # any field of Megatron's TransformerConfig, OptimizerConfig or DDP config

    @property
    def least_micro_batches(self) -> int:
        """To aim at, for a data-parallel rank and optimizer step: the bubble is then at most a fifth of the time."""
        return 4 * self.pp if self.pp > 1 else 1

    @model_validator(mode="after")
    def _consistent(self) -> ActorConfig:
        if self.loss.kl_coef and self.reference == "none":
            raise ValueError(f"loss.kl_coef: {self.loss.kl_coef} needs reference: host, found reference: none")
        if self.old_logprobs == "engine" and self.correction not in ("none", "token_mask"):
            raise ValueError(
                f"correction: {self.correction} needs old_logprobs: recompute; with the engine's, the clipped ratio "
                "already carries the importance weight (none or token_mask)"
            )
        return self


class MemoryConfig(Section):
    """What leaves the GPU while the engine has it."""

    # optimizer and parameters wait in pinned host memory, gradients are given up. Default: optimizer and gradients on a
    # GPU, nothing on a CPU.
    offload: list[Holder] | None = None
    host_gib: float | None = Field(None, gt=0)  # most for the ranks of a node; default: 90 % of what is free

    def offloaded(self, gpu: bool) -> set[Holder]:
        """What leaves the device."""
        if self.offload is not None:
            return set(self.offload)
        return {"optimizer", "gradients"} if gpu else set()


class RewardConfig(Section):
    """What a finished path is worth."""

    # "math", or "package.module:name" called as f(response=, answer=, prompt=, row=) -> float, with row: dict[str, Any]
    # of the row's other columns; or verl's compute_score(data_source, solution_str, ground_truth, extra_info). A
    # coroutine is awaited. What it returns, a number or a mapping with a `score`, is the reward; a leaf counts as
    # correct where that is more than 0. Its process has no environment variables named ...TOKEN, ...KEY, ...SECRET.
    function: str = "math"
    correct: float = 1.0  # math: the reward of a correct answer
    wrong: float = -1.0  # math: of any other; and see `failed`
    workers: int = Field(1, ge=1)  # processes per engine
    timeout: float = Field(5.0, gt=0)  # of one call
    # What a leaf is worth whose call raised, hung or died; such a leaf is not correct, and makes no prompt informative.
    # wrong: `wrong`, which for a function of yours has to be the least that it returns; a number: that; drop: the leaf
    # leaves its tree, as if it had never been sampled.
    failed: Literal["wrong", "drop"] | float = "wrong"
    max_failed: float = Field(0.2, gt=0, le=1)  # share of a step's calls that may fail; beyond it the run stops
    overlong_buffer_tokens: int = Field(0, ge=0)  # soft length penalty over the last tokens (DAPO)
    overlong_penalty: float = Field(1.0, ge=0)
    shuffle: bool = False  # control experiment: rewards permuted among the leaves that a step trains on

    @property
    def custom(self) -> bool:
        """Whether the reward is a function of the user's."""
        return self.function != "math"


class TrainerConfig(Section):
    """The loop."""

    steps: int = Field(100, ge=0)
    max_seconds: float | None = Field(None, gt=0)  # stop after the step that passes this; a resumed run has it anew
    prompts_per_step: int = Field(512, ge=1)
    prompts_per_update: int = Field(32, ge=1)  # mini-batch of one optimizer step, in prompts, at most
    eval_every: int = Field(10, ge=0)  # steps; 0: only before and after
    eval_before: bool = True
    eval_after: bool = True
    # Answers per held-out prompt. 1: greedy decoding. More: independent ones at rollout.temperature, of which accuracy
    # is the mean, majority the share of prompts whose most frequent boxed answer is right, best that with any right.
    eval_samples: int = Field(1, ge=1)
    save_every: int = Field(50, ge=0)  # steps; 0: only at the end
    keep_checkpoints: int = Field(2, ge=1)
    save_trees_every: int = Field(10, ge=0)  # steps; 0: never
    export: bool = True  # write the final policy as a Hugging Face directory


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    filter: FilterConfig = FilterConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    actor: ActorConfig = ActorConfig()
    memory: MemoryConfig = MemoryConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.trainer.prompts_per_update > self.trainer.prompts_per_step:
            raise ValueError(
                f"trainer.prompts_per_update: {self.trainer.prompts_per_update} is more than "
                f"trainer.prompts_per_step = {self.trainer.prompts_per_step}"
            )
        longest = self.data.max_prompt_tokens + self.rollout.tree.response_tokens
        if self.actor.micro_batch_tokens < longest:
            raise ValueError(
                f"actor.micro_batch_tokens: {self.actor.micro_batch_tokens} is less than the longest path, "
                f"data.max_prompt_tokens + the longest response = {longest}"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``a.b.c=value`` overrides (values are YAML), validate.

    Relative paths are taken from the current directory. Raises `ConfigError` with one line.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping at the top, found {type(raw).__name__}")
    for override in overrides or []:
        apply_override(raw, override)
    return parse_config(raw, where=str(file))


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping. Raises `ConfigError` naming the first bad key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def parse_section[S: Section](kind: type[S], options: dict[str, Any]) -> S:
    """A section from command-line options. Raises `ConfigError` naming the first bad one."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def check_grid(config: Config, world: int) -> None:
    """Raise `ConfigError` when the processes do not fill the layout."""
    actor, rollout = config.actor, config.rollout
    model = actor.tp * actor.pp
    if world % model:
        raise ConfigError(
            f"actor.tp x actor.pp = {actor.tp} x {actor.pp}: {world} processes are not a multiple of {model}; "
            f"start torchrun with --nproc-per-node {model * max(1, world // model)} or change the layout"
        )
    if world % rollout.tp:
        raise ConfigError(f"rollout.tp: {world} processes are not a multiple of {rollout.tp}")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put one ``a.b.c=value`` into a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {_one_line(error)}") from error
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
        node = child
    node[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        prefix = "".join(f"{part}." for part in parts[:-1])
        return f"unknown key {key}{did_you_mean(parts[-1], _known_keys(parts[:-1]), prefix)}"
    if first["type"] == "missing":
        return f"missing key {key}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, found {first['input']!r}"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean X?", with the nearest of the known words behind the prefix, or nothing where none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
