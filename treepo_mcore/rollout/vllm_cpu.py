"""What vLLM's CPU build (0.26) needs changed to serve a trainer; nothing of it touches a GPU engine.

Every change replaces a name inside vLLM that is not its public interface: tests/distributed/test_engine.py fails when
one is gone.
"""

from __future__ import annotations

import atexit
import glob
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def prepare(tp: int) -> None:
    """Call before an engine over `tp` ranks is built, on all ranks together."""
    _name_shared_memory(tp)
    _leave_weights_unpacked()
    _leave_fp8_unpacked()
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


def _sample_by_one_number() -> None:
    """Draw a seeded token from one uniform number instead of one exponential a word of the vocabulary.

    vLLM draws these for all requests at once and then, for requests with a seed, again one request at a time. Both
    ways give the same distribution; what they cost is in docs/sampling.md.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    original = TopKTopPSampler.forward_cpu
    if getattr(original, "treepo", False):
        return

    def forward_cpu(
        sampler: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        seeded = len(generators) == len(logits) and k is None and p is None
        if not seeded or sampler.logprobs_mode != "processed_logprobs":
            return original(sampler, logits, generators, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        return draw(logprobs, [generators[row] for row in range(len(logits))]), logprobs

    forward_cpu.treepo = True  # type: ignore[attr-defined]
    TopKTopPSampler.forward_cpu = forward_cpu


def draw(logprobs: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token a row, int64 [R], by inverting the cumulative distribution of float32 [R, V] log-probs."""
    cumulative = logprobs.double().exp_().cumsum_(-1)  # in float32 rare tokens would vanish behind frequent ones
    numbers = [torch.rand((1, 1), dtype=torch.float64, generator=generator) for generator in generators]
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
    atexit.register(_unlink_shared_memory, job)


def _job_token() -> str:
    token = [os.urandom(4).hex()]
    dist.broadcast_object_list(token, 0)
    return token[0]


def _unlink_shared_memory(job: str) -> None:
    for path in glob.glob(f"/dev/shm/*{job}*"):
        Path(path).unlink(missing_ok=True)
