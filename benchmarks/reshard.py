"""Weights from Megatron's shards into vLLM's: gathered, shard to shard, and the floor of a raw copy, side by side.

    nice python benchmarks/reshard.py

measures all rows of docs/resharding.md and prints that table. Starts itself under torchrun for every row; a row that
fails is reported and left as it was. The actor's side is a real Megatron model with random float32 weights and no
optimizer, the engine's a real vLLM model in bfloat16. In every repetition the ways take turns; times are from barrier
to barrier, medians over the repetitions with the range beside them. Rows of an earlier run that this one does not
measure again are kept; each says at which commit it was measured.

floor: for every pair of ranks one contiguous tensor of the plan's bytes, cast and copied into a send buffer, sent,
and copied out; and one contiguous cast copy of the bytes that stay. No plan can do less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import commit, machine

LAYOUTS: dict[tuple[int, int], dict[str, dict[str, int]]] = {  # processes, rollout.tp -> name -> actor
    (2, 2): {"TP2 -> TP2": {"tp": 2}, "PP2 -> TP2": {"pp": 2}, "TP1 DP2 -> TP2": {}},
    (2, 1): {"TP2 -> 2 x TP1": {"tp": 2}, "TP1 DP2 -> 2 x TP1": {}},
    (4, 2): {"TP2 PP2 -> 2 x TP2": {"tp": 2, "pp": 2}, "PP2 DP2 -> 2 x TP2": {"pp": 2}},
    (4, 1): {"TP4 -> 4 x TP1": {"tp": 4}},
    (8, 2): {"TP2 PP2 DP2 -> 4 x TP2": {"tp": 2, "pp": 2}},
}
SIZES = {  # millions of parameters -> sizes of a Qwen2 model
    3: {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 1024},
    50: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 16000},
    500: {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 32000},
}
TOO_LARGE = {(500, 4, 1), (500, 8, 2)}  # millions, processes, rollout.tp: more than 24 GiB
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}


def main() -> None:
    """Parse arguments; without torchrun's environment, start it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], choices=[2, 4, 8])
    parser.add_argument("--millions", type=int, nargs="+", default=[50, 500], choices=sorted(SIZES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rollout-tp", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reshard.json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(options, options.rollout_tp[0])
        return
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows = {(row["processes"], row["millions"], row["case"]): row for row in old}
    at = commit()  # now: the results that are written below are under git too
    measured, failed = 0, []
    for millions, (processes, rollout_tp) in itertools.product(options.millions, LAYOUTS):
        asked = processes in options.processes and rollout_tp in options.rollout_tp
        if not asked or (millions, processes, rollout_tp) in TOO_LARGE:
            continue
        for case in LAYOUTS[processes, rollout_tp]:
            row = launch(options.repeats, millions, processes, rollout_tp, case)
            if row is None:
                failed.append(f"{case}, {processes} processes, {millions}M")
                continue
            measured += 1
            rows[processes, millions, case] = row | {"commit": at}
            print(line(row), flush=True)
            save(options.out, list(rows.values()))
    print("\n".join(table(list(rows.values()))))
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    if not measured:
        sys.exit(1)


def save(file: Path, rows: list[dict[str, Any]]) -> None:
    """Every row names the machine and the commit it was measured on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def launch(repeats: int, millions: int, processes: int, rollout_tp: int, case: str) -> dict[str, Any] | None:
    """One row, in a job of its own: what a job has freed is not all there again for the next row. None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        arguments = ["--job", case, "--rollout-tp", str(rollout_tp), "--millions", str(millions)]
        arguments += ["--repeats", str(repeats), "--out", str(out)]
        job = subprocess.run([*torchrun, __file__, *arguments], stderr=subprocess.PIPE, text=True)
        if job.returncode:
            print(f"{millions}M {processes} {case} failed:\n{job.stderr}", file=sys.stderr, flush=True)
            return None
        row: dict[str, Any] = json.loads(out.read_text())
        return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in docs/resharding.md, milliseconds."""

    def time_of(way: dict[str, float]) -> str:
        median, least, most = (round(way[key] * 1e3) for key in ("median", "min", "max"))
        return f"{median} ({least}-{most})"

    lines = []
    for row in sorted(rows, key=lambda row: (row["processes"], row["millions"])):
        received, least = (max(rank[key] for rank in row["ranks"]) / 1e6 for key in ("received_bytes", "least_bytes"))
        times = " | ".join(time_of(row[way]) for way in ("gather", "direct", "floor"))
        lines.append(
            f"| {row['case']} | {row['processes']}, {row['millions']}M | {times} | {row['direct_over_floor']:.2f} | "
            f"{received:.1f} ({least:.1f}) |"
        )
    return lines


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    times = "  ".join(f"{way} {row[way]['median'] * 1e3:8.1f}" for way in ("gather", "direct", "unverified", "floor"))
    most = {key: max(r[key] for r in row["ranks"]) for key in row["ranks"][0]}
    return (
        f"{row['millions']:3}M {row['processes']} {row['case']:24} ms: {times}  direct/floor "
        f"{row['direct_over_floor']:.2f}  gather/direct {row['gather_over_direct']:5.1f}  most of a rank: "
        f"{most['received_bytes'] / 1e6:.2f} MB received (least possible {most['least_bytes'] / 1e6:.2f}), "
        f"{most['staging_bytes'] / 1e6:.1f} MB staging, checksums {most['checksum_seconds'] * 1e3:.1f} ms"
    )


def measure(options: argparse.Namespace, rollout_tp: int) -> None:
    """Inside a rank."""
    from treepo_mcore.system.environment import prepare_environment

    prepare_environment()
    import torch.distributed as dist

    from treepo_mcore.system.placement import init_process_group

    init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        millions = options.millions[0]
        directory = _write_config(Path(folder), SIZES[millions] | HEADS)
        settings = LAYOUTS[dist.get_world_size(), rollout_tp][options.job]
        row = {"case": options.job, "millions": millions, "processes": dist.get_world_size()}
        row |= _Bench(directory, settings, rollout_tp).run(options.repeats) | {"machine": machine()}
        if dist.get_rank() == 0:
            options.out.write_text(json.dumps(row))
        dist.barrier()


class _Bench:
    def __init__(self, directory: Path, settings: dict[str, int], rollout_tp: int) -> None:
        from treepo_mcore.actor.parallel import build_grid
        from treepo_mcore.config import parse_config
        from treepo_mcore.engine.vllm.engine import VllmEngine
        from treepo_mcore.model.architecture import read_architecture

        self.arch = read_architecture(directory)
        self.config = parse_config(
            {
                "model": {"path": str(directory)},
                "data": {"train": "none", "max_prompt_tokens": 64},
                "actor": {"dtype": "float32"} | settings,
                "rollout": {"tp": rollout_tp, "tree": {"segment_tokens": 16, "max_depth": 4}},
            }
        )
        self.grid = build_grid(self.config.actor, 0)
        self.engine = VllmEngine(self.config, self.arch, directory, ())
        self._build()

    def _build(self) -> None:
        import torch

        from treepo_mcore.actor.cpu import megatron_device
        from treepo_mcore.actor.layout import megatron_layout, megatron_tensors
        from treepo_mcore.actor.model import build_model, megatron_configs
        from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding
        from treepo_mcore.system.placement import colocated
        from treepo_mcore.weights.transfer import Push, plan_push

        with megatron_device():
            model = build_model(megatron_configs(self.config.actor, self.arch), self.arch)
        self.pieces = megatron_layout(model, self.arch, self.grid.place)
        self.tensors = megatron_tensors(model)
        torch.manual_seed(0)  # replicas agree
        for tensor in self.tensors.values():
            tensor.normal_()
        parameters = self.engine.parameters()
        placement = colocated(self.grid.rank, self.grid.world, self.config.rollout.tp)
        where = (parameters, self.arch, self.config.rollout.tp, placement.engine_rank)
        wanted = vllm_layout(*where)
        begin = time.perf_counter()
        self.plan = plan_push(self.pieces, wanted)
        self.plan_seconds = time.perf_counter() - begin
        staging = self.config.rollout.push_staging_mb << 20
        self.push = Push(self.plan, self.tensors, parameters, padding=vllm_padding(*where), staging_bytes=staging)
        self.least = 2 * missing_elements(self.pieces, wanted, self.arch)
        self.floor = _Floor(self.plan, torch.bfloat16)

    def run(self, repeats: int) -> dict[str, Any]:
        """The numbers of a row."""
        import torch.distributed as dist

        ways: dict[str, Callable[[], Any]] = {
            "gather": self._gather,
            "direct": self.push.run,
            "unverified": lambda: self.push.run(verify=False),
            "floor": self.floor.run,
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        reports = []
        for repeat in range(repeats + 1):
            for way, act in ways.items():
                dist.barrier()
                begin = time.perf_counter()
                result = act()
                dist.barrier()
                if repeat:  # the first warms up
                    times[way].append(time.perf_counter() - begin)
                if repeat and way == "direct":
                    reports.append(result)
        everyone: list[Any] = [None] * dist.get_world_size()
        mine = vars(reports[0]) | {"checksum_seconds": statistics.median(r.checksum_seconds for r in reports)}
        dist.all_gather_object(everyone, mine | {"least_bytes": self.least})
        median = {way: statistics.median(values) for way, values in times.items()}
        return {
            "parameters": sum(t.numel for t in self.plan if t.target < self.config.rollout.tp),
            "transfers": len(self.plan),
            "plan_seconds": self.plan_seconds,
            "repeats": repeats,
            **{way: {"median": median[way], "min": min(v), "max": max(v)} for way, v in times.items()},
            "direct_over_floor": median["direct"] / median["floor"],
            "gather_over_direct": median["gather"] / median["direct"],
            "ranks": everyone,
        }

    def _gather(self) -> None:
        import torch

        from treepo_mcore.weights.hf import gather_tensors

        self.engine.wake(gather_tensors(self.arch, self.pieces, self.tensors, torch.bfloat16))


def missing_elements(held: list[Any], wanted: list[Any], arch: Any) -> int:
    """What a rank's engine wants and its actor does not have, counted element by element, without a plan."""
    import torch

    from treepo_mcore.weights.layout import box, hf_shapes

    shapes = hf_shapes(arch)
    by_tensor = defaultdict(list)
    for piece in held:
        by_tensor[piece.tensor].append(piece)
    count = 0
    for piece in wanted:
        absent = torch.ones(shapes[piece.tensor], dtype=torch.bool)
        for own in by_tensor[piece.tensor]:
            box(absent, own.start, own.shape).fill_(False)
        count += int(box(absent, piece.start, piece.shape).sum())
    return count


class _Floor:
    """The plan's bytes between the same ranks, as contiguous as bytes can be."""

    def __init__(self, plan: list[Any], dtype: Any) -> None:
        import torch
        import torch.distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()
        moved = [[0] * world for _ in range(world)]
        for transfer in plan:
            moved[transfer.source][transfer.target] += transfer.numel
        sent = {peer: n for peer, n in enumerate(moved[rank]) if n and peer != rank}
        received = {peer: row[rank] for peer, row in enumerate(moved) if row[rank] and peer != rank}
        # All copies read one array and all write one, so that 500M parameters fit into 24 GiB on four processes.
        self.source = torch.ones(max(moved[rank]))
        self.target = torch.empty(max(row[rank] for row in moved), dtype=dtype)
        self.local = moved[rank][rank]
        self.out = {peer: torch.empty(n, dtype=dtype) for peer, n in sent.items()}
        self.inbox = {peer: torch.empty(n, dtype=dtype) for peer, n in received.items()}

    def run(self) -> None:
        """Cast, send, receive, copy."""
        import torch.distributed as dist

        for wire in self.out.values():
            wire.copy_(self.source[: len(wire)])
        operations = [dist.P2POp(dist.isend, wire, peer) for peer, wire in self.out.items()]
        operations += [dist.P2POp(dist.irecv, wire, peer) for peer, wire in self.inbox.items()]
        works = dist.batch_isend_irecv(operations) if operations else []
        self.target[: self.local].copy_(self.source[: self.local])
        for work in works:
            work.wait()
        for wire in self.inbox.values():
            self.target[: len(wire)].copy_(wire)


def _write_config(folder: Path, sizes: dict[str, Any]) -> Path:
    """A directory with a configuration and no weights. Rank 0's, so that all ranks read the same."""
    import torch.distributed as dist
    from transformers import Qwen2Config

    shared = [str(folder)]
    if dist.get_rank() == 0:
        Qwen2Config(architectures=["Qwen2ForCausalLM"], max_position_embeddings=256, **sizes).save_pretrained(folder)
    dist.broadcast_object_list(shared, 0)
    return Path(shared[0])


if __name__ == "__main__":
    main()
