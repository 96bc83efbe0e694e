"""How trees are sampled."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from treepo_mcore.config.base import IntRange, Section


class BranchingConfig(Section):
    """How many children, for whom (docs/algorithm.md 2.3 to 2.5)."""

    factor: IntRange = (2, 2)  # b, drawn per prompt and wave (all paths of one depth) when a range
    first: IntRange | None = None  # first-level divergence, drawn per prompt; default: `factor`
    # even: remainder to random survivors (the paper's best). low/high_logprob: softmax of the mean log-prob
    # of the last segment; the paper found neither better than even. heaviest: each extra child to the path with the
    # largest mass, which keeps leaves as equal as can be. Or package.module:name (docs/extending.md).
    allocation: str = "even"
    # Instead of factor and first: [[depth, width], ...], where paths fork and how many there are then, those that ended
    # before counted in. Depth 0 is the prompt, a share below 1 is of the running mean of the response length, 1 and
    # more are segments; the last width is tree.width. [[0, 8], [0.45, 16]]: eight paths that fork once. auto: planned
    # from where outcomes are decided, as the trees show it (docs/algorithm.md 2.10).
    schedule: list[tuple[float, int]] | Literal["auto"] | None = None
    replan_every: int = Field(25, ge=1)  # steps, of auto
    temperature: float = Field(2.0, gt=0)  # of that softmax
    temperature_end: float | None = Field(None, gt=0)  # half-cosine from `temperature` to this over the run

    @model_validator(mode="after")
    def _ranges(self) -> BranchingConfig:
        for name, pair in (("factor", self.factor), ("first", self.first)):
            if pair is not None and not 1 <= pair[0] <= pair[1]:
                raise ValueError(f"{name}: expected 1 <= low <= high, found {list(pair)}")
        return self

    @model_validator(mode="after")
    def _planned(self) -> BranchingConfig:
        if self.schedule is not None and self.first is not None:
            raise ValueError(
                f"first: {list(self.first)} is not used beside a schedule, which has the first width itself"
            )
        if self.schedule is None or self.schedule == "auto":
            return self
        depths, widths = [depth for depth, _ in self.schedule], [width for _, width in self.schedule]
        if not depths or depths[0] != 0:
            raise ValueError(f"schedule: expected the prompt's width first, as [0, paths], found {self.schedule}")
        if any(depth < 0 or (depth > 1 and depth % 1) for depth in depths):
            raise ValueError(f"schedule: expected shares in (0, 1) or whole segments as depths, found {depths}")
        if depths != sorted(set(depths)):
            raise ValueError(f"schedule: expected depths that rise, found {depths}")
        if widths[0] < 1 or widths != sorted(set(widths)):
            raise ValueError(f"schedule: expected widths of 1 or more that rise, found {widths}")
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
    # none: nothing restarts, and such a tree has fewer than W leaves.
    candidates: Literal["soft_boxed_and_eos", "random_all", "none"] = "soft_boxed_and_eos"
    # Where on its path the new one begins: at any of the boundaries, before the least likely token, at the prompt.
    cut: Literal["random", "min_logprob_token", "from_start"] = "random"


class PruningConfig(Section):
    """Ending low-value paths early; they stay in the tree as leaves with the reason `pruned`."""

    min_mean_logprob: float | None = Field(None, lt=0)  # of the whole path so far, looked at on boundaries
    function: str | None = None  # "package.module:name", called with a `PathView`, True prunes


class EarlyStopConfig(Section):
    """Giving the rest of a prompt's budget back when its first answers agree (docs/algorithm.md 2.11)."""

    # The first so many paths of a prompt run to their ends before anything else of it starts, and are looked at. Off
    # without a number.
    leaves: int | None = Field(None, ge=2)
    # Where their scores agree, the prompt goes on only if the other answers differ with at least this probability, from
    # how right answers were spread over the prompts of the last steps.
    min_chance: float = Field(0.3, ge=0, le=1)


class ContrastConfig(Section):
    """Starting again behind a remembered answer where all answers agree (docs/algorithm.md 2.13). Biased on purpose."""

    # So many independent answers start behind the first part of an answer of an earlier epoch that had the other
    # outcome; their tree takes the place of the one that agrees. Off without a number; needs early_stop.leaves.
    paths: int | None = Field(None, ge=2)
    cut: float = Field(0.5, gt=0, lt=1)  # the share of its tokens that is replayed, without loss
    memory: int = Field(1000, ge=1)  # prompts whose newest rare answer is kept


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
    early_stop: EarlyStopConfig = EarlyStopConfig()
    contrast: ContrastConfig = ContrastConfig()
    # fork_behind: the parent's request keeps decoding across boundaries, siblings start from the recorded
    # prefix. stop_and_fork: every path stops at every boundary (the released design), for comparison.
    expansion: Literal["fork_behind", "stop_and_fork"] = "fork_behind"

    @model_validator(mode="after")
    def _planned(self) -> TreeConfig:
        schedule = self.branching.schedule
        if schedule is None or schedule == "auto":
            return self
        depth, width = schedule[-1]
        if width != self.width:
            raise ValueError(f"branching.schedule: expected a last width of width = {self.width}, found {width}")
        if depth >= 1 and depth * self.segment_tokens >= self.response_tokens:
            raise ValueError(f"branching.schedule: depth {depth:g} lies behind max_response_tokens or max_depth")
        return self

    @model_validator(mode="after")
    def _looks_early(self) -> TreeConfig:
        first = self.early_stop.leaves
        if first is None:
            if self.contrast.paths is not None:
                raise ValueError(f"contrast.paths: {self.contrast.paths} needs early_stop.leaves, found none")
            return self
        if first >= self.width:
            raise ValueError(f"early_stop.leaves: expected less than width = {self.width}, found {first}")
        if self.expansion != "fork_behind":
            raise ValueError(f"early_stop.leaves: needs expansion: fork_behind, found {self.expansion}")
        return self

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
    # carry: such prompts come first in the next step, sampled anew, and are then left to finish. resume: first, too, on
    # the same engine and from where they were, so that nothing decoded is lost, in as many steps as they need; tokens
    # of before are of the policy of before, which actor.correction is for. A checkpoint does not hold them: a run that
    # goes on samples them anew.
    unfinished: Literal["carry", "resume", "drop"] = "carry"
    # So many times trainer.prompts_per_step are under way, and the phase ends when prompts_per_step are accepted: the
    # slow ones go on in the next step. Needs unfinished: resume.
    over_provision: float = Field(1.0, ge=1)
    # Engine steps between two looks for new prompts of an engine of several ranks, where the last one found none; under
    # run.deterministic, engines wait so often for outstanding rewards and share what they know.
    agreement_every: int = Field(16, ge=1)
    # Buffer of the pushes of weights on every rank, in MiB: both directions and both halves together. Only what is used
    # is taken; 64 hold a row of FP8 blocks of the widest models.
    push_staging_mb: int = Field(256, ge=64)
    # Any argument of vLLM's EngineArgs. With `quantization: fp8_per_block` it computes in FP8; then weights are
    # quantised before they are sent.
    engine: dict[str, Any] = {}

    @model_validator(mode="after")
    def _goes_on(self) -> RolloutConfig:
        if self.over_provision > 1 and self.unfinished != "resume":
            raise ValueError(f"over_provision: {self.over_provision} needs unfinished: resume, found {self.unfinished}")
        return self

    @property
    def expert_parallel(self) -> bool:
        """Whether a rank of an engine has some experts whole, and not a part of each."""
        return self.tp > 1 and bool(self.engine.get("enable_expert_parallel"))
