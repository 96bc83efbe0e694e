"""Teaching by example: a prompt and its answer are a tree of one leaf, and the loss is the answer's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from treepo_mcore.actor.actor import Actor
from treepo_mcore.config import Config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.deal import balance
from treepo_mcore.learn.loss import SupervisedObjective
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.model.shards import token_work
from treepo_mcore.records import Step
from treepo_mcore.tree.tree import EOS, PROMPT, Tree


def example(prompt: Prompt) -> Tree:
    """The answer's tokens, with the one that ends it, behind the prompt's."""
    tree = Tree(prompt.id, prompt.tokens)
    node = tree.nodes[tree.add_node(PROMPT, 1)]
    node.tokens.extend(prompt.taught)
    node.logprobs = array("f", bytes(4 * len(prompt.taught)))
    tree.add_leaf(1, EOS)
    return tree


def teach(actor: Actor, prompts: Sequence[Prompt], step: Step, config: Config) -> None:
    """One optimizer step on the mean log-likelihood of all tokens of the answers, each rank with its share of them.

    Writes the step's update and values, which are equal on all ranks.
    """
    trees = [example(prompt) for prompt in prompts]
    share = balance(trees, actor.grid.dp, token_work(actor.arch), first=step.number)[actor.grid.dp_rank]
    worth = [LeafAdvantage(np.ones(1), np.ones(1))] * len(share)
    most, least = config.actor.micro_batch_tokens, config.actor.least_micro_batches
    sequences = pack_trees([trees[index] for index in share], worth, most, least)
    actor.set_step(step.number)
    update = actor.update(sequences, None, SupervisedObjective())
    actor.finish_updates()
    step.updates.append(update)
    step.values |= {f"actor/{name}": update[name] for name in ("loss", "entropy", "grad_norm", "skipped")}
    step.values |= {"actor/lr": actor.learning_rate, "data/answers": len(prompts)}
    step.values["data/tokens"] = sum(len(prompt.tokens) + len(prompt.taught) for prompt in prompts)
