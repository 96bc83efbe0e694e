"""Where a run lives, what it reads, and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from treepo_mcore.config.base import Section

NEWEST_CHECKPOINT = "latest_checkpointed_iteration.txt"  # names one of run.checkpoints; Megatron-LM's name and content
Holder = Literal["parameters", "gradients", "optimizer"]  # of the actor's memory


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs/treepo")  # checkpoints, metrics.jsonl, trees/, the resolved configuration
    seed: int = Field(0, ge=0)
    deterministic: bool = False  # decisions follow logical time (engine steps), never the clock
    resume: bool = True  # continue from the newest checkpoint in `dir`
    # Checkpoint of another run, RUN/checkpoints/iter_0000100: where `dir` has none, weights and optimizer begin as they
    # are there, at step 0 and with the first prompts.
    start_from: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # tensorboard, wandb, prometheus or package.module:name; get the numbers of metrics.jsonl too.
    trackers: list[str] = []
    prometheus_port: int = Field(9420, ge=1, le=65535)  # of rank 0's node, for the tracker prometheus

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.dir / "checkpoints"


class ModelConfig(Section):
    """The policy: a Hugging Face directory, or a hub name with its revision."""

    path: str = Field(min_length=1)
    revision: str | None = None


AnswerFrom = Literal["column", "gsm8k", "boxed"]
SetName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class PromptsConfig(Section):
    """A file of prompts; what is not given is as in `data`."""

    path: Path
    prompt_key: str | None = None
    answer_key: str | None = None
    answer_from: AnswerFrom | None = None


class TrainingSetConfig(PromptsConfig):
    """One of several files to train on."""

    # Its part of the prompts that are drawn, relative to the other sets; all have one or none. Default: the number of
    # its prompts.
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)


class HeldOutConfig(PromptsConfig):
    """Held-out prompts, and how they are answered."""

    samples: int | None = Field(None, ge=1)  # answers per prompt; default: trainer.eval_samples
    # 0: greedy decoding. Default: greedy with one answer per prompt, else rollout.temperature.
    temperature: float | None = Field(None, ge=0)
    max_response_tokens: int | None = Field(None, ge=1)  # default: that of rollout.tree


class DataConfig(Section):
    """Prompts: JSONL or parquet; `prompt` is a string or a list of chat messages."""

    # A file, or several by name, {gsm8k: {path: gsm8k.parquet, weight: 2}, ...}.
    train: dict[SetName, TrainingSetConfig] | Path
    # Held-out prompts: a file, or several by name, {math: {path: math.jsonl, samples: 16}, ...}.
    eval: dict[SetName, HeldOutConfig] | Path | None = None
    # Prompts of data.train that are held out, too, up to case and white space.
    overlap: Literal["drop", "error", "keep"] = "drop"
    prompt_key: str = "prompt"
    answer_key: str = "answer"  # may be prompt_key: then the assistant's message that ends the list is the answer
    # Where in the answer column the answer is: gsm8k: behind the last "####"; boxed: in the last \boxed{}.
    answer_from: AnswerFrom = "column"
    # "auto": a message list goes through the tokenizer's chat template, a string is used as it stands;
    # "always": a string becomes one user message; "never": message lists are refused.
    chat_template: Literal["auto", "always", "never"] = "auto"
    # Further names for the template, such as {enable_thinking: false} of Qwen3.
    chat_template_kwargs: dict[str, Any] = {}
    system_prompt: str | None = None  # prepended as a system message where a chat template is applied
    max_prompt_tokens: int = Field(1024, ge=1)
    # Of a longer prompt: left, right, middle: tokens are taken away there.
    overlong_prompts: Literal["error", "drop", "left", "right", "middle"] = "error"
    shuffle: bool = True
    # Where files of prompts are kept that were checked and tokenised, a few kilobytes a prompt; whoever needs one again
    # takes it from there. Default: treepo_mcore/prompts below XDG_CACHE_HOME or ~/.cache.
    cache_dir: Path | None = None

    @model_validator(mode="after")
    def _weighed_alike(self) -> DataConfig:
        if isinstance(self.train, dict):
            if not self.train:
                raise ValueError("train: expected a file or sets by name, found none")
            without = [name for name, one in self.train.items() if one.weight is None]
            if without and len(without) < len(self.train):
                raise ValueError(f"train.{without[0]}.weight: expected one, as other sets have it, found none")
        return self

    @property
    def training_sets(self) -> dict[str, TrainingSetConfig]:
        """By name; the name of a single file is empty."""
        return self.train if isinstance(self.train, dict) else {"": TrainingSetConfig(path=self.train)}

    def of(self, one: PromptsConfig) -> DataConfig:
        """The same for one of the sets, with its own columns."""
        given = {name: getattr(one, name) for name in ("prompt_key", "answer_key", "answer_from")}
        return self.model_copy(update={name: value for name, value in given.items() if value is not None})


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


class CommConfig(Section):
    """How long processes wait for each other, in seconds; then the job ends with an error."""

    init_timeout_seconds: float = Field(1800, gt=0)  # until the first step is done
    train_timeout_seconds: float = Field(600, gt=0)  # from then on
    engine_timeout_seconds: float = Field(60, gt=0)  # the ranks of one engine for each other, while it samples
    # For a part of a step (push, rollout, update), an evaluation or a checkpoint; then all ranks show their stacks.
    stuck_seconds: float = Field(7200, gt=0)
    silence_seconds: float = Field(20, ge=5)  # without a sign of life from a node, which is then lost

    @model_validator(mode="after")
    def _shorter_and_shorter(self) -> CommConfig:
        if self.train_timeout_seconds > self.init_timeout_seconds:
            raise ValueError(
                f"train_timeout_seconds: {self.train_timeout_seconds:g} is more than "
                f"init_timeout_seconds = {self.init_timeout_seconds:g}"
            )
        if self.engine_timeout_seconds > self.train_timeout_seconds:
            raise ValueError(
                f"engine_timeout_seconds: {self.engine_timeout_seconds:g} is more than "
                f"train_timeout_seconds = {self.train_timeout_seconds:g}"
            )
        return self


class TrainerConfig(Section):
    """The loop."""

    steps: int = Field(100, ge=0)
    max_seconds: float | None = Field(None, gt=0)  # stop after the step that passes this; a resumed run has it anew
    prompts_per_step: int = Field(512, ge=1)
    prompts_per_update: int = Field(32, ge=1)  # mini-batch of one optimizer step, in prompts, at most
    eval_every: int = Field(10, ge=0)  # steps; 0: only before and after
    eval_before: bool = True
    eval_after: bool = True
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)  # on held-out prompts; then the run ends
    # Answers per held-out prompt. 1: greedy decoding. More: independent ones, of which accuracy is the mean, majority
    # the share of prompts whose most frequent boxed answer is right, best that with any right.
    eval_samples: int = Field(1, ge=1)
    save_every: int = Field(50, ge=0)  # steps; 0: only at the end
    keep_checkpoints: int = Field(2, ge=1)  # the newest
    keep_every: int = Field(0, ge=0)  # steps; checkpoints of these stay, too; 0: none
    keep_best: int = Field(0, ge=0)  # so many stay, too, with the highest held-out accuracy (evaluated at their step)
    # So often a run goes back to its newest checkpoint, and on with other prompts, where a step's numbers are bad
    # (actor.max_skipped, actor.max_mismatch, actor.min_entropy); the next time it ends with the error.
    max_rollbacks: int = Field(0, ge=0)
    save_trees_every: int = Field(10, ge=0)  # steps; 0: never
    profile_steps: list[int] = []  # from 0; traces of them are in run.dir/profile (docs/watching.md)
    profile_ranks: list[int] = [0]
    export: bool = True  # write the final policy as a Hugging Face directory, run.dir/policy
    export_every: int = Field(0, ge=0)  # steps; also then, run.dir/policies/step_000050; 0: never
