"""All that knows Megatron's model."""

import sys

from treepo_mcore.system.environment import installed

if installed("transformer-engine") and not installed("transformer-engine-torch"):
    # Half of TransformerEngine: importing it raises FileNotFoundError, where Megatron expects an ImportError at most.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
