"""vLLM (0.26) as the rollout's engine: inside this process, one per block of ranks. `vllm_cpu` belongs to it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from treepo_mcore.config import Config, ConfigError, RolloutConfig, did_you_mean
from treepo_mcore.engine.costs import BLOCK_FP8, UTILISATION
from treepo_mcore.engine.protocol import Chunk
from treepo_mcore.engine.vllm import cpu as vllm_cpu
from treepo_mcore.engine.vllm.layout import fp8_shapes, refusals, vllm_shapes
from treepo_mcore.grow.sampler import Finish, Request
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.weights.fp8 import check_whole_columns

log = logging.getLogger(__name__)

# Engine arguments that the trainer sets itself -> the key to use instead.
OF_THE_TRAINER = {
    "model": "model.path",
    "tokenizer": "model.path",
    "revision": "model.revision",
    "dtype": "rollout.dtype",
    "seed": "run.seed",
    "tensor_parallel_size": "rollout.tp",
    "pipeline_parallel_size": "rollout.tp (an engine is not pipelined)",
    "data_parallel_size": "rollout.tp (every block of rollout.tp ranks is an engine of its own)",
    "distributed_executor_backend": "nothing: the engine runs inside the torchrun processes",
    "skip_tokenizer_init": "nothing: the trainer tokenises",
    "logprobs_mode": "nothing: ratios need log-probs of the tempered distribution",
    "load_format": "nothing: weights are pushed from the actor",
    "async_scheduling": "nothing: the sampler decides on the tokens of the step just done",
    "enable_sleep_mode": "nothing: on wherever the device can",
    "max_model_len": "data.max_prompt_tokens and rollout.tree.max_response_tokens",
    "hf_overrides": "nothing: the engine would sample from another model than the actor trains",
    "logits_processors": "nothing: ratios need log-probs of the tempered distribution",
    "speculative_config": "nothing: the sampler feeds on single tokens",
}
FINISH: dict[FinishReason, Finish] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}  # others: lost
MOE_BACKEND = "triton"  # on GPUs: leaves experts' weights as they are in the checkpoint
KERNEL_BLOCK = 16  # tokens; what vLLM's attention kernels take multiples of, on a CPU and on GPUs
STUCK_STEPS = 100  # no request that waits is started in so many steps: none ever will be
CPU_CACHE_BYTES = (
    1 << 30
)  # of a process's KV cache, where rollout.engine says nothing; all of it is written at the start
CPU_BLOCK = 32  # tokens; vLLM's CPU default of 128 serves few prefixes, below 32 the fast attention path is lost


class VllmEngine:
    """See `engine.protocol.Engine`. Build it after the process groups, outside `megatron_device`."""

    def __init__(self, config: Config, arch: Architecture, directory: Path, eos_ids: tuple[int, ...]) -> None:
        """eos_ids: tokens that end an answer; they stay part of it.

        Raises `ConfigError` for unknown or owned keys under rollout.engine. What vLLM refuses is found by
        `check_engine`; errors of loading and compiling pass as they are.
        """
        self.eos_ids = list(eos_ids)
        arguments = engine_arguments(config, arch, directory)
        if not torch.cuda.is_available():
            vllm_cpu.prepare(config.rollout.tp)
        # vLLM seeds the global generators while it starts.
        with torch.random.fork_rng(devices=[]), _launcher_environment():
            self.llm = LLM(**arguments)
        # Requests go to the client of the engine core and outputs come from there: `LLMEngine` would build detokenised,
        # dictionary-shaped results of every token, at the price of a tenth of the time of a small step.
        self.client = self.llm.llm_engine.engine_core
        self.scheduler = _scheduler(self.client)
        self.preempted = _count_preemptions(self.scheduler)
        self.stuck = 0  # steps in a row in which nothing ran
        if torch.cuda.is_available() and torch.distributed.get_rank() == 0:
            version = 2 if self.llm.llm_engine.vllm_config.use_v2_model_runner else 1
            log.info("vLLM's Model Runner V%d (VLLM_USE_V2_MODEL_RUNNER; docs/gpu.md)", version)

    def submit(self, request: Request) -> None:
        # Rows of the embedding behind the tokenizer's last word can be sampled, with the mass that an
        # untrained row has: next to none. They are not forbidden: log-probs would be those of a distribution that the
        # actor does not compute, and vLLM asks for a list a request (allowed_token_ids: the vocabulary, logit_bias: the
        # rows, gathered again at every change of the batch). Such tokens have no text, see `Collector.text_of`.
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            logprobs=0,
            detokenize=False,
            seed=request.seed,
            stop_token_ids=self.eos_ids,
        )
        self._add(request.id, request.context, params)

    def abort(self, ids: list[str]) -> None:
        self.client.abort_requests(ids)

    def step(self) -> list[Chunk]:
        return [_chunk(output) for output in self._outputs()]

    @property
    def block_tokens(self) -> int:
        return int(self.scheduler.block_size)

    @property
    def max_requests(self) -> int:
        return int(self.scheduler.max_num_running_reqs)

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def preemptions(self) -> int:
        return self.preempted[0]

    def _outputs(self) -> list[EngineCoreOutput]:
        """Of one step of the engine core. Raises RuntimeError where it schedules nothing, step after step."""
        outputs: list[EngineCoreOutput] = self.client.get_output().outputs
        self.stuck = 0 if outputs or self.scheduler.running else self.stuck + 1
        if self.stuck > STUCK_STEPS:
            raise RuntimeError(
                f"vLLM has scheduled nothing in {self.stuck} steps: {len(self.scheduler.waiting)} requests wait, with "
                f"{self.free_blocks()} free cache blocks and room for {self.max_requests} requests"
            )
        return outputs

    def sleep(self) -> None:
        # Level 2 frees the weights too: the next push brings new ones. On a CPU the call frees nothing.
        self.llm.sleep(level=2)

    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """With full HF tensors, by vLLM's own loader: what tests and benchmarks compare pushes with."""
        self.wake_weights()
        # The method of the worker that `reload_weights` names; called directly, because an RPC pickles its arguments.
        self._runner().reload_weights(weights_iterator=iter(weights))
        self.wake_cache()

    def parameters(self) -> dict[str, Tensor]:
        """This rank's own parameters by vLLM's names, for direct writes between `wake_weights` and `wake_cache`.

        They stay where they are for the engine's life, asleep or awake.
        """
        return {name: parameter.detach() for name, parameter in self._runner().model.named_parameters()}

    def wake_weights(self) -> None:
        """Memory for the weights, whose values are then undefined."""
        self.llm.wake_up(["weights"])

    def wake_cache(self) -> None:
        """Ready to generate, after the last parameter is written."""
        self.llm.wake_up(["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached prefixes of the old weights: requests were still running at the push")

    def weight_bytes(self) -> int:
        """Of this rank's parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parameters().values())

    def reserved_bytes(self) -> int:
        """Most GPU memory that the engine takes while it is awake: its share, or weights and the KV cache asked for.

        0 on a CPU.
        """
        if not torch.cuda.is_available():
            return 0
        cache = self.llm.llm_engine.vllm_config.cache_config
        if cache.kv_cache_memory_bytes is not None:  # vLLM then does not look at the share
            return self.weight_bytes() + int(cache.kv_cache_memory_bytes)
        return int(cache.gpu_memory_utilization * torch.cuda.mem_get_info()[1])

    def _add(self, name: str, context: list[int], params: SamplingParams) -> None:
        # The same time for all: first come, first served, on every rank of the engine.
        request = EngineCoreRequest(name, context, None, params, None, 0.0, None, None, None)
        self.client.add_request(request)

    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner


def _chunk(output: EngineCoreOutput) -> Chunk:
    tokens = output.new_token_ids
    # One row a token; its first column is the sampled token's.
    logprobs = output.new_logprobs.logprobs[:, 0].tolist() if output.new_logprobs is not None else []
    prefill = output.prefill_stats  # with a request's first token
    finish = None if output.finish_reason is None else FINISH.get(output.finish_reason, "abort")
    return Chunk(output.request_id, tokens, logprobs, finish, prefill.num_cached_tokens if prefill else 0)


def engine_arguments(config: Config, arch: Architecture, directory: Path) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, `rollout.engine` checked against the installed EngineArgs and merged in.

    Under FP8 it also sets VLLM_USE_DEEP_GEMM=0, which vLLM has no argument for. Raises `ConfigError`.
    """
    _check_pass_through(config.rollout)
    longest = config.data.max_prompt_tokens + config.longest_response
    if longest > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest response = {longest} is more than the model's "
            f"max_position_embeddings = {arch.max_positions}"
        )
    # Refuses what vLLM only asserts, once it builds the model.
    vllm_shapes(arch, config.rollout.tp, config.rollout.expert_parallel)
    _check_experts(config.rollout, arch)
    _prepare_quantization(config.rollout, arch)
    arguments: dict[str, Any] = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "dtype": config.rollout.dtype,
        "seed": config.run.seed,
        "tensor_parallel_size": config.rollout.tp,
        "distributed_executor_backend": "external_launcher",
        "load_format": "dummy",
        "max_model_len": longest,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",
        "hf_overrides": {"rope_parameters": arch.rotary.for_vllm()},  # as the actor reads config.json
    }
    if torch.cuda.is_available():
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": UTILISATION}
        if arch.experts:
            arguments |= {"moe_backend": MOE_BACKEND}
    else:
        arguments |= {"block_size": CPU_BLOCK, "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return arguments | config.rollout.engine


def check_engine(config: Config, arch: Architecture, directory: Path) -> None:
    """Let vLLM judge its arguments as a whole, which takes a fraction of a second, before anything is built.

    Call it after the process group is there: vLLM derives ranks from it. Raises `ConfigError`.
    """
    if config.rollout.engine.get("quantization") and not _runs_fp8():
        raise ConfigError("rollout.engine.quantization: vLLM's FP8 kernel for CPUs needs AMX, which this one has not")
    with refusals(), _launcher_environment():
        EngineArgs(**engine_arguments(config, arch, directory)).create_engine_config()


@contextmanager
def _launcher_environment() -> Iterator[None]:
    """On a CPU vLLM sets LOCAL_WORLD_SIZE to the ranks of its engine; to all others it means the ranks of this node."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    try:
        yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def _check_pass_through(config: RolloutConfig) -> None:
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for key in config.engine:
        if key in OF_THE_TRAINER:
            raise ConfigError(f"rollout.engine.{key}: set by the trainer; use {OF_THE_TRAINER[key]}")
        if key not in known:
            raise ConfigError(f"unknown key rollout.engine.{key}{did_you_mean(key, known, 'rollout.engine.')}")
    block = config.engine.get("block_size", KERNEL_BLOCK)
    if not isinstance(block, int) or block < 1 or block % KERNEL_BLOCK:  # vLLM says so once it has built the model
        raise ConfigError(f"rollout.engine.block_size: expected a multiple of {KERNEL_BLOCK}, found {block!r}")


def _check_experts(config: RolloutConfig, arch: Architecture) -> None:
    if arch.experts is None:
        if config.engine.get("enable_expert_parallel"):
            raise ConfigError(
                f"rollout.engine.enable_expert_parallel: needs a mixture of experts, found a {arch.family} model"
            )
        return
    for key, only, why in (
        ("moe_backend", MOE_BACKEND, "others keep experts' weights in an order that pushes do not know"),
        ("quantization", None, "pushes do not know FP8 experts"),
        ("expert_placement_strategy", "linear", "pushes know experts in runs"),
        ("enable_eplb", False, "pushes know each expert once"),
    ):
        if config.engine.get(key, only) != only:
            found = config.engine[key]
            raise ConfigError(f"rollout.engine.{key}: expected {only} with a mixture of experts, found {found}: {why}")


def _prepare_quantization(config: RolloutConfig, arch: Architecture) -> None:
    found = config.engine.get("quantization")
    if found is None:
        return
    if found != BLOCK_FP8:
        raise ConfigError(f"rollout.engine.quantization: found {found}, pushes know {BLOCK_FP8} (or none)")
    if config.dtype == "float32":
        raise ConfigError(f"rollout.dtype: float32 with quantization {BLOCK_FP8}; vLLM takes bfloat16 or float16")
    check_whole_columns(fp8_shapes(arch, config.tp))
    if os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0") != "0":  # on GPUs
        raise ConfigError(
            f"VLLM_USE_DEEP_GEMM: found {os.environ['VLLM_USE_DEEP_GEMM']}, expected 0 with quantization {BLOCK_FP8}: "
            "DeepGEMM rounds scales to powers of two after loading, and pushes write them as they are"
        )


def _runs_fp8() -> bool:
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()


def _scheduler(client: Any) -> Any:
    """The scheduler behind an in-process client; its names are not vLLM's public interface."""
    return client.engine_core.scheduler


def _count_preemptions(scheduler: Any) -> list[int]:
    """A counter of one number that goes up whenever the scheduler takes a request's blocks away."""
    count = [0]
    original = scheduler._preempt_request

    def preempt(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        return original(*arguments, **keywords)

    scheduler._preempt_request = preempt
    return count
