"""FP8 through TransformerEngine's layers: named recipes, what each needs, and whether this machine has it.

`actor.fp8` names the recipes that are set up here; any other one of Megatron's goes through `actor.megatron.fp8` and
`fp8_recipe`. The pass for log-probs and the update go through the same layers in the same precision, so that ratios
compare like with like. Attention, norms, the embedding and the output layer stay in `actor.dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.enums import Fp8Recipe
from torch import nn

from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.system.machine import Machine

# First and last layers are the ones that FP8 hurts most (Megatron Bridge's recipes leave them in bf16, too).
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    # One scale a tensor, of the tensor itself. Gradients need the range of E5M2, weights and activations do not.
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    # One scale for 128 elements of an activation and 128 x 128 of a weight: E4M3 has range enough for gradients.
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise", "first_last_layers_bf16": True},
}


@dataclass(frozen=True)
class Needs:
    """What a recipe of Megatron-Core 0.19.2 needs: versions from its fp8_utils.py, the rest from TransformerEngine."""

    te: tuple[int, ...]
    capability: tuple[int, int] = (8, 9)
    below: tuple[int, int] | None = None  # capabilities from here on cannot
    cuda: tuple[int, ...] = (12, 1)
    tokens: int = 16  # rows of a GEMM come in multiples of this
    width: int = 16  # and its other two sizes in multiples of this


NEEDS = {
    Fp8Recipe.delayed: Needs(te=(1, 0)),
    Fp8Recipe.tensorwise: Needs(te=(2, 2)),
    # The last number lets sequence-parallel shards be gathered quantised; others would be gathered in bf16.
    Fp8Recipe.blockwise: Needs(te=(2, 3), capability=(9, 0), cuda=(12, 9), tokens=128),
    Fp8Recipe.mxfp8: Needs(te=(2, 1), capability=(10, 0), below=(12, 0), tokens=32, width=32),
    Fp8Recipe.custom: Needs(te=(2, 9), tokens=128),
}


# Of these TransformerEngine puts parameters into Megatron's buffer, and scales come from the weights themselves.
QUANTISED_PARAMETERS = (Fp8Recipe.tensorwise, Fp8Recipe.blockwise)


def precision_fields(actor: ActorConfig, arch: Architecture, machine: Machine) -> dict[str, Any]:
    """Megatron's fields of `actor.fp8`, after a look at those in `actor.megatron`, which win over them.

    Raises `ConfigError` for what contradicts itself and for what the machine cannot run, before anything is built.
    """
    named, own = RECIPES[actor.fp8], actor.megatron
    for key in ("fp8", "fp8_recipe"):
        if named and key in own:
            raise ConfigError(f"actor.megatron.{key}: set by actor.fp8: {actor.fp8}; to choose it, leave actor.fp8 out")
    fields = named | own
    if fields.get("fp8") is None:
        for key in ("fp8_recipe", "fp8_param", "fp8_param_gather"):
            if fields.get(key):
                raise ConfigError(f"actor.megatron.{key}: has no effect without actor.megatron.fp8 (e4m3 or hybrid)")
        return named
    where = f"actor.fp8: {actor.fp8}" if named else "actor.megatron.fp8"
    if actor.dtype != "bfloat16":
        raise ConfigError(f"{where}: needs actor.dtype: bfloat16, found {actor.dtype}")
    if arch.experts:
        raise ConfigError(f"{where}: not supported with a mixture of experts ({arch.family})")
    recipe = _recipe(fields)
    _check_quantised_parameters(actor, recipe)
    check_recipe(recipe, machine, where)
    _check_widths(actor, arch, NEEDS[recipe], where)
    return named


def check_recipe(recipe: Fp8Recipe, machine: Machine, where: str) -> None:
    """Raise `ConfigError` naming the key `where` when the machine cannot run the recipe."""
    needs, found = NEEDS[recipe], machine.capability
    what = f"{where}: the recipe {recipe.value} needs"
    if found is None:
        raise ConfigError(
            f"{what} an NVIDIA GPU and TransformerEngine; on a CPU leave actor.fp8 and actor.megatron.fp8 out"
        )
    if machine.te is None:
        raise ConfigError(f"{what} TransformerEngine {_dots(needs.te)} or newer, which is not installed (docs/gpu.md)")
    if machine.te < needs.te:
        raise ConfigError(f"{what} TransformerEngine {_dots(needs.te)} or newer, found {_dots(machine.te)}")
    if found < needs.capability or (needs.below and found >= needs.below):
        limit = f" and below {_dots(needs.below)}" if needs.below else ""
        raise ConfigError(f"{what} compute capability {_dots(needs.capability)} or higher{limit}, found {_dots(found)}")
    if machine.cuda < needs.cuda:
        raise ConfigError(f"{what} a torch for CUDA {_dots(needs.cuda)} or newer, found {_dots(machine.cuda)}")


def token_multiple(fields: dict[str, Any]) -> int:
    """Tokens of a (sequence-parallel shard of a) packed sequence come in multiples of this. fields: Megatron's."""
    return NEEDS[_recipe(fields)].tokens if fields.get("fp8") else 1


def forget_fp8_copies(model: nn.Module) -> None:
    """Free the quantised weights that TransformerEngine's layers keep between micro-batches.

    One or two bytes a parameter. Every pass begins by making them from the parameters anew, missing or not.
    """
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


def _recipe(fields: dict[str, Any]) -> Fp8Recipe:
    name = fields.get("fp8_recipe") or Fp8Recipe.delayed
    try:
        return Fp8Recipe(name)
    except ValueError:
        known = ", ".join(recipe.value for recipe in Fp8Recipe)
        raise ConfigError(f"actor.megatron.fp8_recipe: expected one of {known}, found {name!r}") from None


def _check_quantised_parameters(actor: ActorConfig, recipe: Fp8Recipe) -> None:
    """FP8 parameters, only where all that touches them is known to go well together (docs/gpu.md says why)."""
    own = actor.megatron
    where = "actor.megatron.fp8_param, fp8_param_gather"
    if bool(own.get("fp8_param")) != bool(own.get("fp8_param_gather")):
        raise ConfigError(f"{where}: go together; set both")
    if not own.get("fp8_param"):
        return
    if recipe not in QUANTISED_PARAMETERS:
        known = ", ".join(each.value for each in QUANTISED_PARAMETERS)
        raise ConfigError(f"{where}: expected one of the recipes {known}, found {recipe.value}")
    if not actor.optimizer.distributed:
        raise ConfigError(f"{where}: need actor.optimizer.distributed, which quantises them after an update")
    if actor.reference != "none":
        raise ConfigError(f"{where}: need actor.reference: none; weights that change places would be rounded twice")


def _check_widths(actor: ActorConfig, arch: Architecture, needs: Needs, where: str) -> None:
    """A quantised GEMM has no odd sizes: both sides of every weight's shard."""
    widths = {
        "hidden size": arch.hidden,
        "FFN width per rank": arch.ffn // actor.tp,
        "attention width per rank": arch.heads * arch.head_dim // actor.tp,
        "width of q, k and v per rank": (arch.heads + 2 * arch.kv_heads) * arch.head_dim // actor.tp,
    }
    for what, width in widths.items():
        if width % needs.width:
            raise ConfigError(f"{where}: the model's {what} must be a multiple of {needs.width}, found {width}")


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
