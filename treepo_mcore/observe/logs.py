"""What is worth reading on a terminal: our own log, and the libraries' errors."""

from __future__ import annotations

import logging
import warnings

# They warn, on every rank, of what we chose knowingly: torch's Adam and norms on a CPU, GPTModel, no CUDA runtime.
LIBRARIES = ("megatron", "vllm", "transformers", "torch.utils.cpp_extension", "torch.distributed.run")


def set_up_logging(level: str) -> None:
    """Log records of `level` and above from this package; errors only from libraries, everything under "debug"."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("treepo_mcore").setLevel(level.upper())
    if level == "debug":
        return
    warnings.filterwarnings("ignore", module=r"megatron|transformers|torch")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
