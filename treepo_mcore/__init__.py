"""Tree-structured reinforcement learning (TreePO) with Megatron-Core actors and a colocated vLLM engine."""

__version__ = "0.1.0"
