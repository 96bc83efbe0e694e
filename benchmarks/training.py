"""Training on trees, on trees that share the prompt only, and on flattened leaves, side by side on the same weights.

    python benchmarks/training.py --layouts tp1 tp2 pp2 --out benchmarks/results/training.json
    python benchmarks/training.py --quick --json
    python benchmarks/training.py --layouts pp2 --cases "b2 prompt 64" --out benchmarks/results/training.json
    python benchmarks/training.py --trees runs/quickstart/trees/step_000020.jsonl --out benchmarks/results/training.json

Every layout is a job of its own under torchrun. In every repetition the three packings take turns at a log-prob pass
and an update of all trees, with one attention kernel and one token budget; times are from barrier to barrier, medians
over the repetitions with the range beside them. The speedup is the time of the flat packing over that of the tree, to
be compared with ``logical_over_unique``: the tokens that go through the network flat, prompts included, over those that
do as trees. Rows that --out has already and that are not measured again stay. Generated trees come from the real
sampler; each token of an answer ends it with probability 1 / mean.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from machine import machine  # noqa: E402

from treepo_mcore.config import StoppingConfig, TreeConfig, parse_config  # noqa: E402
from treepo_mcore.grow.sampler import Request, TreeSampler  # noqa: E402
from treepo_mcore.grow.stopping import BoxDetector, RuleStopper  # noqa: E402
from treepo_mcore.learn.loss import PolicyObjective  # noqa: E402
from treepo_mcore.learn.packing import pack_flat, pack_trees  # noqa: E402
from treepo_mcore.records import PackedSequence  # noqa: E402
from treepo_mcore.tree.files import read_trees, write_trees  # noqa: E402
from treepo_mcore.tree.tree import EOS, PROMPT, Tree  # noqa: E402

VOCAB = 2048
ANY_MODEL = {"vocab_size": VOCAB, "max_position_embeddings": 16384}
# In narrow models attention and the output layer outweigh what trees share; "wide" is for the cases where they do.
MODELS = {
    "512 wide": ANY_MODEL
    | {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "2048 wide": ANY_MODEL
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
REAL = {"hidden": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocab": 152064}  # Qwen2.5-7B
LAYOUTS: dict[str, dict[str, int]] = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
PACKINGS = ("tree", "prompt", "flat")
KEY = ("case", "model", "layout", "trees")  # of a row


@dataclass(frozen=True)
class Case:
    """Trees to generate: lengths in tokens. A token ends its answer with probability 1 / `answer`."""

    factor: int
    prompt: int
    answer: int
    segment: int
    width: int = 16

    @property
    def name(self) -> str:
        return f"b{self.factor} prompt {self.prompt} answer {self.answer}"

    def count(self, layout: str) -> int:
        """Trees: few where they are long, more where stages of a pipeline would wait for sequences.

        Long answers make trees of several sequences.
        """
        if "pp" in LAYOUTS[layout]:
            return 8 if self.answer < 1024 else 4
        return 4 if self.prompt + self.answer < 1024 else 1


PAPER = Case(factor=2, prompt=16, answer=128, segment=32)  # 14 x 512 tokens, answers near 2048, by 16
QUICK = [Case(factor=2, prompt=64, answer=128, segment=32)]
CASES = [
    Case(factor=b, prompt=prompt, answer=answer, segment=answer // 4)
    for b in (2, 4)
    for prompt in (64, 512, 2048)
    for answer in (256, 1024)
] + [PAPER]


def main() -> None:
    """Parse arguments; without torchrun's environment, start it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="how names begin")
    parser.add_argument("--layouts", nargs="+", default=["tp1"], choices=LAYOUTS)
    parser.add_argument("--model", default="512 wide", choices=MODELS, help="sizes; four layers or one (2048 wide)")
    parser.add_argument("--trees", type=Path, help="trees saved by a run, in place of generated ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(options.job)
        return
    known = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    rows = {tuple(row[name] for name in KEY): row for row in known}
    for layout in options.layouts:
        for name, trees in cases(options, layout):
            key = (name, options.model, layout, len(trees))
            rows[key] = row = dict(zip(KEY, key, strict=True)) | launch(trees, options.model, layout, options.repeats)
            if not options.json:
                print(line(row), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(summary(list(rows.values())), indent=1) + "\n")
    if options.json:
        print(json.dumps(summary(list(rows.values()))))


def cases(options: argparse.Namespace, layout: str) -> list[tuple[str, list[Tree]]]:
    """Names and trees."""
    if options.trees:
        return [(options.trees.name, [_within_vocabulary(tree) for tree in read_trees(options.trees)])]
    chosen = [case for case in (QUICK if options.quick else CASES) if case.name.startswith(tuple(options.cases))]
    return [(case.name, [generate(case, seed) for seed in range(case.count(layout))]) for case in chosen]


def _within_vocabulary(tree: Tree) -> Tree:
    """The benchmark's model has few words; which ones they are costs nothing."""
    for node in tree.nodes:
        node.tokens = array("i", [token % VOCAB for token in node.tokens])
    return tree


def generate(case: Case, seed: int) -> Tree:
    """A tree of the real sampler over an engine that draws tokens evenly and ends answers at the case's rate."""
    draw = random.Random(f"{case.name}/{seed}")
    stopping = StoppingConfig(boxed="none", repetition_count=0)
    config = TreeConfig.model_validate(
        {
            "width": case.width,
            "segment_tokens": case.segment,
            "max_depth": 14,
            "branching": {"factor": case.factor},
            "stopping": stopping,
        }
    )
    prompt = [draw.randrange(4, VOCAB) for _ in range(case.prompt)]
    tree = Tree(f"{case.name}/{seed}", prompt)
    sampler = TreeSampler(tree, config, RuleStopper(stopping, BoxDetector(lambda tokens: "")), (seed,))
    running = {request.id: request for request in sampler.start().submit}
    while not sampler.done:
        request = running.pop(next(iter(running)))
        actions = sampler.on_tokens(request.id, *_answer(request, case, draw))
        running |= {new.id: new for new in actions.submit}
        for stopped in actions.abort:
            running.pop(stopped, None)
    for leaf in tree.leaves:
        leaf.correct = draw.random() < 0.5
        leaf.reward = 1.0 if leaf.correct else -1.0
    return tree.canonical()


def _answer(request: Request, case: Case, draw: random.Random) -> tuple[list[int], list[float], Any]:
    """All tokens of a request, log-probs, why it ended."""
    drawn = math.ceil(-math.log(1 - draw.random()) * case.answer)
    count = min(max(drawn, 1), request.max_tokens)
    tokens = [draw.randrange(4, VOCAB) for _ in range(count)]
    return tokens, [-draw.random() for _ in tokens], "stop" if drawn <= request.max_tokens else "length"


def prompt_only(tree: Tree) -> Tree:
    """The same leaves with nothing but the prompt shared."""
    star = Tree(tree.prompt_id, tree.nodes[PROMPT].tokens)
    for index, leaf in enumerate(tree.leaves):
        node = star.nodes[star.add_node(PROMPT, 1)]
        node.tokens, node.logprobs = array("i", tree.response(index)), array("f", tree.response_logprobs(index))
        star.leaves[star.add_leaf(len(star.nodes) - 1, EOS)].reward = leaf.reward
    return star


def launch(trees: Sequence[Tree], model: str, layout: str, repeats: int) -> dict[str, Any]:
    """One layout in a job of its own."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Qwen2Config(**MODELS[model])).save_pretrained(job / "model")
        write_trees(job / "trees.jsonl", trees)
        (job / "job.json").write_text(json.dumps({"model": model, "layout": layout, "repeats": repeats}))
        processes = math.prod(LAYOUTS[layout].values())
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*torchrun, __file__, "--job", folder], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{layout}: exit status {done.returncode}\n{done.stderr[-6000:]}")
        row: dict[str, Any] = json.loads((job / "row.json").read_text())
        return row


def measure(job: Path) -> None:
    """Inside a rank: the row of the table."""
    from treepo_mcore.actor.actor import Actor
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group

    settings = json.loads((job / "job.json").read_text())
    trees = list(read_trees(job / "trees.jsonl"))
    longest = max(tree.nodes[leaf.node].end for tree in trees for leaf in tree.leaves)
    config = parse_config(
        {
            "model": {"path": str(job / "model")},
            "data": {"train": "none"},
            "actor": {"dtype": "float32", "micro_batch_tokens": max(8192, longest)} | LAYOUTS[settings["layout"]],
        }
    ).actor
    init_process_group()
    grid = build_grid(config, seed=0)
    arch = read_architecture(job / "model")
    actor = Actor(config, arch, job / "model", grid, temperature=1.0, total_steps=1)
    packed = pack(trees, config.micro_batch_tokens, config.least_micro_batches)
    for sequences in packed.values():  # warms up
        for act in passes(actor, sequences[:1]).values():
            act()
    times: dict[str, list[float]] = {}
    for _ in range(settings["repeats"]):
        for packing, sequences in packed.items():
            for what, act in passes(actor, sequences).items():
                times.setdefault(f"{what}_{packing}", []).append(timed(act))
    if grid.rank == 0:
        (job / "row.json").write_text(json.dumps(describe(trees, settings["model"], packed, times)))
    dist.barrier()


def pack(trees: Sequence[Tree], budget: int, least: int) -> dict[str, list[PackedSequence]]:
    """The same leaves three ways."""
    from treepo_mcore.config import AdvantageConfig
    from treepo_mcore.learn.advantage import advantages

    worth = advantages(trees, AdvantageConfig())
    return {
        "tree": pack_trees(trees, worth, budget, least),
        "prompt": pack_trees([prompt_only(tree) for tree in trees], worth, budget, least),
        "flat": pack_flat(trees, worth, budget, least),
    }


def passes(actor: Any, sequences: list[PackedSequence]) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    old = [sequence.behaviour_logprob for sequence in sequences]
    return {
        "logprob": lambda: actor.log_probs(sequences),
        "update": lambda: actor.update(sequences, old, PolicyObjective(actor.config)),
    }


def timed(act: Callable[[], Any]) -> float:
    """Seconds from barrier to barrier."""
    dist.barrier()
    begin = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - begin


def describe(
    trees: Sequence[Tree], model: str, packed: dict[str, list[PackedSequence]], times: dict[str, list[float]]
) -> dict[str, Any]:
    """Tokens, seconds and ratios."""
    tokens = {packing: sum(len(s.tokens) for s in sequences) for packing, sequences in packed.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = tokens["flat"] / tokens["tree"]
    row: dict[str, Any] = {
        "machine": machine(),
        "leaves": sum(len(tree.leaves) for tree in trees),
        "answer_tokens_mean": sum(tree.logical_tokens for tree in trees) / sum(len(tree.leaves) for tree in trees),
        "tokens": tokens,
        "logical_over_unique": ratio,
        "arithmetic_ratio": arithmetic_ratio(packed, sizes(model)),
        "arithmetic_ratio_7b": arithmetic_ratio(packed, REAL),
        "seconds": {
            name: {"median": median[name], "min": min(values), "max": max(values)} for name, values in times.items()
        },
    }
    for what in ("logprob", "update"):
        row[f"speedup_{what}"] = median[f"{what}_flat"] / median[f"{what}_tree"]
        row[f"share_{what}"] = row[f"speedup_{what}"] / ratio
        row[f"speedup_{what}_over_prompt"] = median[f"{what}_prompt"] / median[f"{what}_tree"]
        row[f"logical_tokens_per_second_{what}"] = {p: tokens["flat"] / median[f"{what}_{p}"] for p in PACKINGS}
    return row


def sizes(model: str) -> dict[str, int]:
    """Of one of `MODELS`, in the names of `REAL`."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(REAL, [*(MODELS[model][name] for name in names), VOCAB], strict=True))


def arithmetic_ratio(packed: dict[str, list[PackedSequence]], model: dict[str, int]) -> float:
    """What flat costs over what trees do, in multiplications: the speedup that the arithmetic allows."""
    work = {packing: sum(arithmetic(s, **model) for s in packed[packing]) for packing in ("flat", "tree")}
    return work["flat"] / work["tree"]


def arithmetic(
    sequence: PackedSequence, *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> int:
    """Multiplications of a forward pass: layers, attention over what each token sees, output layer.

    Shared tokens stand early in their paths and see little, so attention shrinks less than the tokens do; and prompt
    tokens, which are shared most, have no logits.
    """
    layer = hidden * (hidden // heads) * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn
    tokens, seen = len(sequence.tokens), int((sequence.positions + 1).sum())
    return layers * (tokens * layer + 2 * seen * hidden) + len(sequence.target) * hidden * vocab


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    ratios = f"tokens x{row['logical_over_unique']:.2f} arithmetic x{row['arithmetic_ratio']:.2f}"
    ratios += f" (7B x{row['arithmetic_ratio_7b']:.2f})"
    parts = [f"{row['layout']} {row['case']:28} {row['model']} {ratios}"]
    for what in ("logprob", "update"):
        seconds = " ".join(f"{p} {row['seconds'][f'{what}_{p}']['median']:.2f}" for p in PACKINGS)
        parts.append(f"{what}: {seconds} s, x{row[f'speedup_{what}']:.2f} = {row[f'share_{what}']:.0%}")
    return "  ".join(parts)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the rows, and the rows."""
    names = ("speedup_update", "speedup_logprob", "logical_over_unique", "share_update", "share_logprob")
    means = {name: statistics.geometric_mean(row[name] for row in rows) for name in names}
    for what in ("logprob", "update"):
        shares = [row[f"speedup_{what}"] / row["arithmetic_ratio"] for row in rows]
        means[f"share_of_arithmetic_{what}"] = statistics.geometric_mean(shares)
    return means | {"models": MODELS, "rows": rows}


if __name__ == "__main__":
    main()
