"""Process settings that must stand before torch is imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# They ask a rank to save and stop (observe/signals.py).
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

# Without a GPU. One OpenMP thread a process: spinning threads of a second process make everything fifty times
# slower. Dynamo off: vLLM would compile for a minute and then step slower.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
ENVIRONMENT = {
    # The engine runs inside the trainer's process and is driven step by step.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# With one.
GPU_ENVIRONMENT = {
    # Kernels start in the order in which they were queued: Megatron's overlapped communication counts on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def driver_is_there() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return os.path.exists("/dev/nvidiactl")


def has_gpu() -> bool:
    """Whether an NVIDIA device is there and not hidden; torch need not be imported for it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return driver_is_there() and not hidden


def prepare_environment() -> None:
    """Set defaults; whatever the user has set stays."""
    for key, value in (ENVIRONMENT | (GPU_ENVIRONMENT if has_gpu() else CPU_ENVIRONMENT)).items():
        os.environ.setdefault(key, value)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside never hear `STOP_SIGNALS`: Slurm sends them to everything below a task.

    They end when their pipe from the rank closes, or by SIGKILL.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
