"""Process settings that must stand before torch is imported."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

# They ask a rank to save and stop (system/signals.py).
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

# Without a GPU. One OpenMP thread a process: spinning threads of a second process make everything fifty times
# slower. Dynamo off: vLLM would compile for a minute and then step slower.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
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


OPEN_FILES = 65536  # a process; two sockets to every other rank are more than the usual 1024 from 512 ranks on


PACKAGES = (  # that decide what a run computes, how fast, and with whom it can talk
    "treepo_mcore",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "nvidia-nccl-cu13",
    "numpy",
)


def package_versions() -> dict[str, str]:
    """Of Python and those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    return found | {name: have for name in PACKAGES if (have := installed(name))}


def driver_is_there() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return os.path.exists("/dev/nvidiactl")


def installed(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_is_for_cpus() -> bool:
    """Whether the vLLM that is installed is the one for CPUs: then nothing here uses a GPU."""
    return installed("vllm-cpu") is not None and installed("vllm") is None


def has_gpu() -> bool:
    """Whether an NVIDIA device is there, not hidden, and of use to the engine; torch need not be imported for it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return driver_is_there() and not hidden and not engine_is_for_cpus()


def gpus_are_missing() -> bool:
    """Whether the vLLM that is installed is the one for GPUs, on a machine that has none, such as a login node."""
    return installed("vllm") is not None and not driver_is_there()


def prepare_environment() -> None:
    """Set defaults; whatever the user has set stays, but GPUs are hidden where the engine is the one for CPUs.

    Torch would use them all the same, and half of a run would be on each device.
    """
    if driver_is_there() and engine_is_for_cpus() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # processes started from here find it set, and say nothing
        if os.environ.get("RANK", "0") == "0":
            log.warning("vllm-cpu is installed: everything runs on the CPU, GPUs are hidden (docs/gpu.md)")
    _raise_open_files()
    for key, value in (ENVIRONMENT | (GPU_ENVIRONMENT if has_gpu() else CPU_ENVIRONMENT)).items():
        os.environ.setdefault(key, value)


def _raise_open_files() -> None:
    """Every rank has sockets to all others, twice: gloo of torch's default group and of vLLM's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


@contextmanager
def all_cores() -> Iterator[None]:
    """Scope in which tokenizers may use threads, as they look at the environment at every call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "true")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before
