"""What a push of a job on paper moves, over which links, and how long the bytes take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from treepo_mcore.plan.hardware import Gpu, Network
from treepo_mcore.weights.fp8 import quantisers
from treepo_mcore.weights.plan import Box, Transfer, make_rounds
from treepo_mcore.weights.transfer import ALIGNMENT, HALVES, STAGING_BYTES, round_limit

if TYPE_CHECKING:  # Megatron and vLLM come with it
    from treepo_mcore.plan.paper import PaperJob

KINDS = ("same GPU", "same node", "across nodes")
GPU, NODE, NETWORK = range(3)
SENT, RECEIVED = range(2)
WHO = {
    "owner": "their owners",
    "receiver": "their receivers",
    "both": "owners, blocks that shards cut by receivers",
}


def reshard_report(job: PaperJob, gpu: Gpu, network: Network, staging_bytes: int = STAGING_BYTES) -> dict[str, Any]:
    """The push of all ranks in numbers, ready for JSON; sizes in bytes, times in seconds.

    staging_bytes: of `weights.transfer.Push`. Raises `ConfigError` where there is no plan.
    """
    plan = job.plan()
    rounds = make_rounds(plan, round_limit(staging_bytes, len(job.nodes)), job.itemsize)
    in_rounds = [traffic(part, job.nodes, job.itemsize) for part in rounds]
    total = traffic(plan, job.nodes, job.itemsize)
    rate = np.array([gpu.hbm / 2, gpu.nvlink, network.bandwidth])  # [kind]; a copy reads and writes
    copies = float(total[GPU].max() / rate[GPU])  # while the rounds are on the wire
    return {
        "ranks": len(job.nodes),
        "nodes": job.nodes[-1] + 1,
        "actor": {name: getattr(job.grids[0], name) for name in ("tp", "pp", "dp")},
        "engines": len(job.places[0].engines),
        "rollout_tp": len(job.parameters),
        "transfers": len(plan),
        "rounds": len(rounds),
        "covered_once": all(
            covered_once(transfers, job.to_fill(rank)) for rank, transfers in enumerate(_by_target(plan, job))
        ),
        "bytes_sent_max": int(total[NODE:, SENT].sum(0).max()),
        "bytes_received_max": int(total[NODE:, RECEIVED].sum(0).max()),
        "bytes": {kind: int(total[k, RECEIVED].sum()) for k, kind in enumerate(KINDS)},
        "by_rank": {
            kind: {"sent": total[k, SENT].tolist(), "received": total[k, RECEIVED].tolist()}
            for k, kind in enumerate(KINDS)
        },
        "busiest_link": busiest_link(total, rate),
        "quantised_by": dict(Counter(quantisers(plan).values())),
        "staging_bytes_max": staging_used(rounds, len(job.nodes), job.itemsize),
        "bytes_per_second": dict(zip(KINDS, rate.tolist(), strict=True)),
        "seconds_predicted": max(copies, sum(float(_seconds(part, rate).max()) for part in in_rounds)),
        # If no port ever waited for another one.
        "seconds_at_least": max(copies, float(_seconds(total, rate).max(initial=0.0))),
    }


def traffic(transfers: Iterable[Transfer], nodes: list[int], itemsize: int) -> np.ndarray:
    """Bytes, int64 [kind of link, sent or received, rank]. itemsize: of an element of the rollout's dtype."""
    table = np.zeros((len(KINDS), 2, len(nodes)), dtype=np.int64)
    for transfer in transfers:
        kind = GPU if transfer.local else NODE if nodes[transfer.source] == nodes[transfer.target] else NETWORK
        count = transfer.bytes(itemsize)
        table[kind, SENT, transfer.source] += count
        table[kind, RECEIVED, transfer.target] += count
    return table


def covered_once(transfers: Iterable[Transfer], to_fill: dict[str, int]) -> bool:
    """Whether the transfers into one rank write every element once.

    to_fill: local tensor -> elements to be written.
    """
    boxes: dict[tuple[str, tuple[int, ...]], list[Box]] = defaultdict(list)  # by local tensor and slab of it
    written: dict[str, int] = defaultdict(int)
    for transfer in transfers:
        slab = len(transfer.target_start) - len(transfer.shape)
        start = transfer.target_start
        boxes[transfer.target_local, start[:slab]].append((start[slab:], transfer.shape))
        written[transfer.target_local] += transfer.numel
    return written == to_fill and all(_disjoint(found) for found in boxes.values())


def busiest_link(total: np.ndarray, rate: np.ndarray) -> dict[str, Any]:
    """The port between GPUs that needs longest for its bytes. total: as `traffic` gives it."""
    seconds = _seconds(total, rate)
    kind, direction, rank = np.unravel_index(seconds.argmax(), seconds.shape)
    return {
        "kind": KINDS[NODE + kind],
        "rank": int(rank),
        "direction": ("sends", "receives")[direction],
        "bytes": int(total[NODE + kind, direction, rank]),
        "seconds": float(seconds.max()),
    }


def staging_used(rounds: list[list[Transfer]], world: int, itemsize: int) -> int:
    """Bytes of the largest staging buffer of any rank, as `Push` allocates it."""
    buffers = np.zeros((HALVES, 2, world), dtype=np.int64)
    for number, transfers in enumerate(rounds):
        messages: dict[tuple[int, int], int] = defaultdict(int)
        for transfer in transfers:
            messages[transfer.source, transfer.target] += transfer.bytes(itemsize)
        needed = np.zeros((2, world), dtype=np.int64)
        for pair, size in sorted(messages.items()):  # each begins where the one before it ends, aligned
            for direction, rank in enumerate(pair):
                needed[direction, rank] = -(-needed[direction, rank] // ALIGNMENT) * ALIGNMENT + size
        np.maximum(buffers[number % HALVES], needed, out=buffers[number % HALVES])
    return int(buffers.sum((0, 1)).max())


def describe(report: dict[str, Any]) -> list[str]:
    """The report for people, in lines."""
    actor = " ".join(f"{name}{size}" for name, size in report["actor"].items())
    busiest, quantised = report["busiest_link"], report["quantised_by"]
    rows = [_row(kind, report) for kind in KINDS]
    return [
        f"{report['ranks']} ranks on {report['nodes']} nodes; actor {actor} -> "
        f"{report['engines']} x engine tp{report['rollout_tp']}",
        f"{report['transfers']:,} transfers, {report['rounds']:,} rounds; "
        + ("every byte arrives once" if report["covered_once"] else "NOT every byte arrives once"),
        f"{'GB':14}{'total':>10}{'a rank sends':>19}{'a rank receives':>19}{'GB/s':>8}",
        *rows,
        *(f"FP8: {count} weights quantised by {WHO[who]}" for who, count in sorted(quantised.items())),
        f"a rank receives at most {report['bytes_received_max'] / 1e9:.2f} GB from others, "
        f"stages at most {report['staging_bytes_max'] / (1 << 20):.0f} MiB",
        f"busiest link: rank {busiest['rank']} {busiest['direction']} {busiest['bytes'] / 1e9:.2f} GB "
        f"{busiest['kind'].replace('same', 'within its')}, {busiest['seconds']:.3f} s",
        f"predicted {report['seconds_predicted']:.3f} s; {report['seconds_at_least']:.3f} s if no port ever waited",
    ]


def _row(kind: str, report: dict[str, Any]) -> str:
    ranges = (f"{min(of) / 1e9:.2f} - {max(of) / 1e9:.2f}" for of in report["by_rank"][kind].values())
    cells = "".join(f"{cell:>19}" for cell in ranges)
    return f"{kind:14}{report['bytes'][kind] / 1e9:10.1f}{cells}{report['bytes_per_second'][kind] / 1e9:8.0f}"


def _seconds(table: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Of the links that leave the GPU: [kind, direction, rank]. All of a GPU's ports work at once."""
    return table[NODE:] / rate[NODE:, None, None]


def _by_target(plan: list[Transfer], job: PaperJob) -> list[list[Transfer]]:
    split: list[list[Transfer]] = [[] for _ in job.nodes]
    for transfer in plan:
        split[transfer.target].append(transfer)
    return split


def _disjoint(boxes: list[Box]) -> bool:
    return not any(_overlap(one, other) for index, one in enumerate(boxes) for other in boxes[index + 1 :])


def _overlap(one: Box, other: Box) -> bool:
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True))
