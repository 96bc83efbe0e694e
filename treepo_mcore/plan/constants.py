"""Numbers that no data sheet gives: some fitted on two published runs, the others assumed.

`tools/fit_planner.py` fits and prints them; a test holds these equal to its result. docs/planning.md says how well they
predict runs that they were not fitted on.
"""

from __future__ import annotations

# Fitted on the phases of Llama-3.1-8B on 8 H100 and on the total of Qwen3-32B on 32 (plan/references.py).
UPDATE_EFFICIENCY = 0.3957  # of the peak rate: forward and backward, with all between the products
LOG_PROB_EFFICIENCY = 0.4326  # the same, forward only
ENGINE_LAYER_SECONDS = 1.73e-4  # of the host, each layer of an engine step: attention is launched between graphs
ENGINE_REQUEST_SECONDS = 1.409e-5  # of the host, each request in an engine step
TENSOR_SECONDS = 22.76e-3  # the gathered push: each tensor of the checkpoint's layout
STEP_SECONDS = 3.0  # each step, outside all phases: data, packing, metrics

# Assumed.
ENGINE_BANDWIDTH = 0.75  # of the peak memory rate, reading weights and keys while decoding
FP8_GAIN = 1.4  # of FP8 linear layers over bf16, everything around the products included
LINK_EFFICIENCY = 0.8  # of a link's rate, large messages
ALL_REDUCE_SECONDS = 15e-6  # latency of a small all-reduce inside a node, from NVLink switch to kernel end
NETWORK_ALL_REDUCE_SECONDS = 40e-6  # the same across nodes
ENGINE_EFFICIENCY = 0.6  # of the peak rate, matrix products of prefills and large decoding batches
COPY_PASSES = 4  # times that pushed bytes are read or written in GPU memory: pack, checksum, unpack, checksum
ROUND_SECONDS = 1e-3  # each round of the shard-to-shard push
