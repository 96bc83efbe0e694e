"""What every rank imports, once for all of them: `harness.py` forks ranks from a process that has imported this."""

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

import megatron.core  # noqa: E402, F401
import transformers  # noqa: E402, F401
import vllm.v1.engine.core_client  # noqa: E402, F401

import treepo_mcore.trainer  # noqa: E402, F401
