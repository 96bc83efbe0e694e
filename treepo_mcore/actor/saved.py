"""A look at a saved checkpoint before a model is built: is it whole, and is it of this model?"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from treepo_mcore.config import ConfigError
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.files import read_json
from treepo_mcore.model.sizes import Sizes

LAYERS = "decoder.layers."
ADVICE = "name an older one in latest_checkpointed_iteration.txt, or begin anew with run.resume: false"


def check_saved(checkpoint: Path, sizes: Sizes) -> None:
    """Raise `ConfigError` where a file of it is missing, cut short or somebody else's, or it is of another model."""
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint; {ADVICE}")
    _check_owner(checkpoint)
    backend = read_json(checkpoint / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise ConfigError(f"{checkpoint / 'metadata.json'}: expected sharded_backend torch_dist, found {backend!r}")
    metadata = _metadata(checkpoint)
    _check_files(checkpoint, metadata)
    _check_shapes(checkpoint, metadata, sizes)


def _check_owner(checkpoint: Path) -> None:
    """Torch unpickles a checkpoint, and that runs whatever its writer put there."""
    for file in sorted(checkpoint.iterdir()):
        owner = file.stat().st_uid
        if owner != os.geteuid():
            raise ConfigError(
                f"{file}: belongs to user {owner}, expected {os.geteuid()}: loading a checkpoint runs code from it. If "
                "you trust its writer, copy the directory, which makes it yours"
            )


def _metadata(checkpoint: Path) -> Metadata:
    file = checkpoint / ".metadata"
    if not file.is_file():
        raise ConfigError(f"{file}: missing, the checkpoint is not whole; {ADVICE}")
    try:
        found = FileSystemReader(checkpoint).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise ConfigError(f"{file}: not the metadata of a checkpoint ({type(error).__name__}); {ADVICE}") from error
    if not isinstance(found, Metadata):
        raise ConfigError(f"{file}: not the metadata of a checkpoint, found {type(found).__name__}; {ADVICE}")
    return found


def _check_files(checkpoint: Path, metadata: Metadata) -> None:
    needed: dict[str, int] = defaultdict(int)
    for place in (metadata.storage_data or {}).values():
        needed[place.relative_path] = max(needed[place.relative_path], place.offset + place.length)
    for name, size in sorted(needed.items()):
        file = checkpoint / name
        if not file.is_file():
            raise ConfigError(f"{file}: missing, the checkpoint is not whole; {ADVICE}")
        if file.stat().st_size < size:
            raise ConfigError(f"{file}: cut short, expected {size} bytes, found {file.stat().st_size}; {ADVICE}")


def _check_shapes(checkpoint: Path, metadata: Metadata, sizes: Sizes) -> None:
    saved = metadata.state_dict_metadata
    found = {name: tuple(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    for names, expected in _expected(sizes):
        # TransformerEngine's layers have some tensors under other names than Megatron's own.
        name = next((name for name in names if name in found), None)
        if name is None:
            raise ConfigError(f"{checkpoint}: of another model: it has no {names[0]}")
        if found[name] != expected:
            raise ConfigError(
                f"{checkpoint}: of another model: {name} has the shape {list(found[name])}, expected {list(expected)}"
            )


def _expected(sizes: Sizes) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Names that a tensor of the layers may have, and its shape.

    Megatron keeps all layers' tensors of one name as one, layers first, and where layers differ, those of a mixture,
    each layer's by itself; a layer's experts are one tensor, experts first.
    """
    layers = parts_of(sizes).layers
    if sizes.experts is None:
        for part in layers[0]:
            yield [LAYERS + name for name in part.megatron], (sizes.layers, *part.actor_shape(1))
        return
    for number, layer in enumerate(layers):
        for part in layer:
            prefix, shape = f"{LAYERS}{number}.", part.actor_shape(1)
            if part.experts:
                linear = part.megatron[0].rsplit("{}.", 1)[1]  # linear_fc1.weight
                yield [f"{prefix}mlp.experts.experts.{linear}"], (part.experts, *shape)
            else:
                yield [prefix + name for name in part.megatron], shape
