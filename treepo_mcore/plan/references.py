"""Published GRPO runs of NeMo-RL on H100, as configurations of ours, and what the planner says of them.

Sources: the blog post "Reinforcement Learning with NVIDIA NeMo-RL: Megatron-Core Support for Optimized Training
Throughput" (NVIDIA, 2025-08-20; v0.3), the performance page of v0.4, the configurations in the repository, and issue
959 there, in which a user ran the blog's runs again. All: 64 prompts x 32 answers of at most 4096 tokens with the
prompt, mini-batches of 512 answers, a reference policy, DGX H100. Mean prompt lengths follow from the tokens per second
and GPU of the performance page: 132 tokens for Llama, 110 for Qwen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from treepo_mcore.config import Config, parse_config
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan import constants
from treepo_mcore.plan.decode import rollout_time
from treepo_mcore.plan.hardware import Cluster, make_cluster
from treepo_mcore.plan.memory import plan_engine
from treepo_mcore.plan.seconds import log_prob_time, push_time, update_time
from treepo_mcore.plan.workload import Assumptions, make_workload

PHASES = ("update", "refit", "generation", "log_probs", "total")
LONGEST = 4096
LOG_PROB_PACK = 4 * LONGEST  # tokens of a micro-batch in NeMo-RL's log-prob pass


@dataclass(frozen=True)
class Reference:
    """One run. Seconds of its phases; a phase that was not published is missing."""

    name: str
    source: str
    model: str
    gpus: int
    tp: int
    pp: int
    engine_tp: int
    prompt_tokens: int
    response_tokens: int  # mean
    measured: dict[str, float]
    again: dict[str, float] | None = None  # the user's rerun
    sequence_parallel: bool = False
    fitted: bool = False  # the constants come from this run


def _llama(hidden: int, ffn: int, layers: int, heads: int) -> Sizes:
    return _sizes("llama", hidden, ffn, layers, heads, 128256)


def _sizes(family: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int) -> Sizes:
    return Sizes(
        family=family,
        hidden=hidden,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        vocab=vocab,
        norm_eps=1e-5,
        tied=False,
        max_positions=131072,
        initializer_range=0.02,
    )


MODELS = {
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "Qwen3-32B": _sizes("qwen3", 5120, 25600, 64, 64, 151936),
}

EIGHT = Reference(
    "Llama-3.1-8B, 8 GPUs",
    "blog, v0.3",
    "Llama-3.1-8B",
    8,
    1,
    1,
    1,
    132,
    795,
    {"update": 28, "refit": 5, "generation": 58, "log_probs": 18, "total": 112},
    {"update": 27, "refit": 8, "generation": 56, "log_probs": 18, "total": 116},
    fitted=True,
)
THIRTY_TWO = Reference(
    "Qwen3-32B, 32 GPUs",
    "performance page, v0.4",
    "Qwen3-32B",
    32,
    4,
    4,
    4,
    110,
    3206,
    {"total": 393},
    sequence_parallel=True,
    fitted=True,
)
SEVENTY = Reference(
    "Llama-3.1-70B, 64 GPUs, engine TP8",
    "blog, v0.3",
    "Llama-3.1-70B",
    64,
    4,
    4,
    8,
    132,
    398,
    {"update": 28, "refit": 14, "generation": 84, "log_probs": 18, "total": 147},
    {"update": 31, "refit": 26, "generation": 87, "log_probs": 20, "total": 178},
)
REFERENCES = (
    EIGHT,
    THIRTY_TWO,
    SEVENTY,
    replace(SEVENTY, name="Llama-3.1-70B, 64 GPUs, engine TP4", engine_tp=4),
    Reference(
        "Qwen3-32B, 64 GPUs",
        "blog, v0.3",
        "Qwen3-32B",
        64,
        4,
        2,
        4,
        110,
        3283,
        {"update": 68, "refit": 7, "generation": 96, "log_probs": 40, "total": 213},
    ),
    Reference(
        "Llama-3.1-8B, 16 GPUs",
        "performance page, v0.4",
        "Llama-3.1-8B",
        16,
        1,
        2,
        1,
        132,
        1060,
        {"total": 97.7},
    ),
)


def reference_config(run: Reference) -> Config:
    """The run in our terms: flat sampling and flat packing."""
    longest = LONGEST - run.prompt_tokens
    raw: dict[str, Any] = {
        "model": {"path": run.model},
        "data": {"train": "OpenMathInstruct-2", "max_prompt_tokens": run.prompt_tokens},
        "rollout": {
            "tp": run.engine_tp,
            "sampler": "flat",
            "tree": {"width": 32, "segment_tokens": longest, "max_depth": 1},
            "engine": {"max_num_seqs": 256},
        },
        "filter": {"enabled": False},
        "actor": {
            "tp": run.tp,
            "pp": run.pp,
            "sequence_parallel": run.sequence_parallel,
            "packing": "flat",
            "micro_batch_tokens": LONGEST,
            "reference": "host",
            "loss": {"kl_coef": 0.01},
            "megatron": {"grad_reduce_in_fp32": False, "overlap_grad_reduce": True, "overlap_param_gather": True},
        },
        "trainer": {"prompts_per_step": 64, "prompts_per_update": 16},
    }
    return parse_config(raw, run.name)


def predict(run: Reference) -> dict[str, float]:
    """Seconds of NeMo-RL's phases, and `push`: what our shard-to-shard push would take in the place of its refit."""
    config, sizes, cluster = reference_config(run), MODELS[run.model], reference_cluster(run)
    work = make_workload(config, Assumptions(run.prompt_tokens, run.response_tokens, 1.0))
    work = replace(work, predicted=work.packed)  # NeMo-RL makes logits of prompts, too
    engine = plan_engine(config, sizes, cluster)
    push = push_time(config, sizes, cluster, engine)
    seconds = {
        "update": update_time(config, sizes, cluster, work).seconds,
        "refit": push.gather_seconds,
        "generation": rollout_time(config, sizes, cluster, engine, work, reserve=0).seconds,
        "log_probs": log_prob_time(config, sizes, cluster, work, limit=LOG_PROB_PACK),
    }
    return seconds | {"total": sum(seconds.values()) + constants.STEP_SECONDS, "push": push.seconds}


def reference_cluster(run: Reference) -> Cluster:
    """DGX H100 nodes of 8."""
    return make_cluster("h100", "ib400", run.gpus // 8, 8)


def comparison() -> list[dict[str, Any]]:
    """Rows of the table: run, phase, measured and predicted seconds, error; our push as a phase without a measure."""
    rows = []
    for run in REFERENCES:
        predicted = predict(run)
        for phase in (*PHASES, "push"):
            measured = run.measured.get(phase)
            rows.append(
                {
                    "run": run.name,
                    "fitted": run.fitted,
                    "phase": phase,
                    "measured": measured,
                    "again": (run.again or {}).get(phase),
                    "predicted": predicted[phase],
                    "error": predicted[phase] / measured - 1 if measured else None,
                }
            )
    return rows
