"""Where a run lives, what it reads, and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from treepo_mcore.config.base import Section

NEWEST_CHECKPOINT = "latest_checkpointed_iteration.txt"  # names one of run.checkpoints; Megatron-LM's name and content
Holder = Literal["parameters", "gradients", "optimizer"]  # of the actor's memory


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
    # Further names for the template, such as {enable_thinking: false} of Qwen3.
    chat_template_kwargs: dict[str, Any] = {}
    system_prompt: str | None = None  # prepended as a system message where a chat template is applied
    max_prompt_tokens: int = Field(1024, ge=1)
    overlong_prompts: Literal["error", "drop"] = "error"
    shuffle: bool = True


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
