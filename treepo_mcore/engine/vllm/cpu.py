"""What vLLM's CPU build (0.26) needs changed to serve a trainer; nothing of it touches a GPU engine.

Every change replaces a name inside vLLM that is not its public interface: tests/distributed/test_engine.py fails when
one is gone.
"""

from __future__ import annotations

import atexit
import fcntl
import inspect
import os
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

SHARED = Path("/dev/shm")
OURS = "treepo_mcore-"
_held: list[IO[str]] = []  # open as long as this process lives


def prepare(tp: int) -> None:
    """Call before an engine over `tp` ranks is built, on all ranks together."""
    _name_shared_memory(tp)
    _leave_weights_unpacked()
    _leave_fp8_unpacked()
    _leave_experts_unpacked()
    _sample_by_one_number()


def _leave_weights_unpacked() -> None:
    """Keep parameters ordinary tensors on a CPU, where vLLM would hide them inside its matrix kernels.

    vLLM has no setting for it; this makes its dispatcher take its own fallback, torch's linear layer. What that
    costs is in docs/resharding.md.
    """
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
    os.environ["VLLM_CPU_SGL_KERNEL"] = "0"


def _leave_fp8_unpacked() -> None:
    """Keep FP8 weights [N, K] and their scales [N / 128, K / 128] in the places where pushes write them.

    vLLM packs the values for AMX after loading; its kernel also takes them unpacked. (It wants a float32 bias, which
    its caller in vLLM does not give it.)
    """
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel as Kernel

    def apply_weights(kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        bias = bias if bias is None else bias.float()
        sizes = list(kernel.weight_group_shape)
        out = _custom_ops.fp8_scaled_mm_cpu(flat, layer.weight, layer.weight_scale_inv, sizes, bias, x.dtype, False)
        return out.view(*x.shape[:-1], -1)

    Kernel.apply_weights = apply_weights
    Kernel.process_weights_after_loading = lambda kernel, layer: None


def _leave_experts_unpacked() -> None:
    """Compute experts from the parameters that pushes write, and on each rank its own where they are spread over ranks.

    vLLM's kernel packs weights in place, under the same name and shape, its other form keeps the tensors that were
    there when they were loaded, and both take every expert for one of this rank's.
    """
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    fused = cpu_fused_moe.CPUFusedMOE
    if getattr(fused.__call__, "treepo", False):
        return
    signature, choices = inspect.signature(fused.__call__), inspect.signature(cpu_fused_moe.select_experts).parameters

    def own_experts(kernel: Any, layer: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        call = signature.bind(kernel, layer, x, *arguments, **keywords)
        call.apply_defaults()
        given = call.arguments
        chosen = {name: given[name] for name in choices.keys() & given.keys()}
        weights, ids = cpu_fused_moe.select_experts(hidden_states=x, **chosen)
        local = ids
        if given["expert_map"] is not None:  # -1: another rank's; the runner adds up what ranks give
            local = given["expert_map"][ids.long()]
        out = torch.zeros(x.shape, dtype=weights.dtype)
        activation = cpu_fused_moe._CPU_MOE_ACT_FN[given["activation"]]
        for expert in range(len(layer.w13_weight)):
            token, place = (local == expert).nonzero(as_tuple=True)
            if len(token):
                inner = activation(linear(x[token], layer.w13_weight[expert]))
                result = linear(inner, layer.w2_weight[expert])
                out.index_add_(0, token, result.to(out.dtype) * weights[token, place, None])
        return out.to(x.dtype)

    own_experts.treepo = True  # type: ignore[attr-defined]
    fused.__init__ = lambda kernel, layer: None
    fused.__call__ = own_experts


def _sample_by_one_number() -> None:
    """Draw a seeded token from one uniform number instead of one exponential a word of the vocabulary.

    vLLM draws these for all requests at once and then, for requests with a seed, again one request at a time, and it
    forgets all seeds when one request of the batch has none. The distribution is the same; what it costs is in
    docs/sampling.md.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original, sample_tokens = TopKTopPSampler.forward_cpu, GPUModelRunner.sample_tokens
    if getattr(original, "treepo", False):
        return

    def forward_cpu(
        sampler: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not generators or k is not None or p is not None or sampler.logprobs_mode != "processed_logprobs":
            return original(sampler, logits, generators, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        return draw(logprobs, generators), logprobs

    def sample_whole_prompts(runner: Any, *arguments: Any, **keywords: Any) -> Any:
        # What a request samples before its whole prompt is in is thrown away. vLLM then turns its generator back,
        # which a CPU's cannot do: such a request gets none for this step.
        generators = runner.input_batch.generators
        partial = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
        kept = {row: generators.pop(row) for row in partial if row in generators}
        try:
            return sample_tokens(runner, *arguments, **keywords)
        finally:
            generators.update(kept)

    forward_cpu.treepo = True  # type: ignore[attr-defined]
    TopKTopPSampler.forward_cpu = forward_cpu
    GPUModelRunner.sample_tokens = sample_whole_prompts


def draw(logprobs: Tensor, generators: dict[int, torch.Generator]) -> Tensor:
    """One token a row, int64 [R], by inverting the cumulative distribution of float32 [R, V] log-probs.

    generators: row -> the generator of its seed; other rows share torch's own.
    """
    cumulative = logprobs.double().exp_().cumsum_(-1)  # in float32 rare tokens would vanish behind frequent ones
    rows = range(len(logprobs))
    numbers = [torch.rand((1, 1), dtype=torch.float64, generator=generators.get(row)) for row in rows]
    found = torch.searchsorted(cumulative, torch.cat(numbers) * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp_max(logprobs.shape[1] - 1)  # a product may round up to the total


def _name_shared_memory(tp: int) -> None:
    """Give the CPU all-reduce a segment name of this job.

    vLLM's name is the same for every job on a host, so two jobs collide and a crashed one blocks the next.
    """
    if tp == 1:
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    job = f"{os.environ['MASTER_PORT']}-{_job_token()}"
    original = _CPUSHMDistributed.make_group_name
    if getattr(original, "treepo", False):
        return

    def make_group_name(communicator: Any) -> str:
        return f"{original(communicator).replace('/', '')}-{job}"

    make_group_name.treepo = True  # type: ignore[attr-defined]
    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
    if os.environ["LOCAL_RANK"] == "0":
        remove_leftovers()
        _hold(job)
    atexit.register(_unlink_shared_memory, job)


def _job_token() -> str:
    token = [os.urandom(4).hex()]
    dist.broadcast_object_list(token, 0)
    return token[0]


def _hold(job: str) -> None:
    """Lock a file of the job's name: the system gives it free when this process is gone, however it ends."""
    part = SHARED / f"{OURS}{job}.part"
    handle = part.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    part.rename(part.with_suffix(".job"))
    _held.append(handle)


def remove_leftovers() -> None:
    """Unlink the segments of this user's jobs that were killed on this machine, which could not do it themselves."""
    for file in SHARED.glob(f"{OURS}*.job"):
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its job lives
                continue
            if file.stat().st_uid == os.getuid():
                _unlink_shared_memory(file.stem.removeprefix(OURS))


def _unlink_shared_memory(job: str) -> None:
    for path in SHARED.glob(f"*{job}*"):
        path.unlink(missing_ok=True)
