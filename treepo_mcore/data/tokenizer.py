"""Tokenizers: a Hugging Face directory, or one that holds nothing but a SentencePiece `tokenizer.model`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from treepo_mcore.config import ConfigError
from treepo_mcore.model.files import refuse_pointer

Message = dict[str, Any]  # {"role": ..., "content": ...}

_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SENTENCEPIECE_FILE = "tokenizer.model"
_SMALL = (".json", ".model", ".txt", ".jinja")  # ends of the files beside the weights


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    vocab_size: int  # ids are below this; a model's embedding may have more rows
    eos_ids: tuple[int, ...]  # every id that ends a response; the tokenizer's own first

    def encode(self, text: str, start: bool = False) -> list[int]:
        """Token ids of `text` as it stands; `start` puts the tokenizer's BOS in front, where it uses one."""
        ...

    def encode_many(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """What `encode` gives for each of them, on all cores where the library can."""
        ...

    @property
    def identity(self) -> str:
        """A hash of the files that it is made from."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens, and ids from `vocab_size` on, are left out."""
        ...

    @property
    def template(self) -> Any:
        """The chat template's text, or several by name; None without one."""

    def render_chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """Messages in the chat template, up to where the assistant speaks. options: further names for the template.

        Raises `ConfigError` without a template, and with what the template says where it refuses the messages.

        The text brings its own special tokens: encode it without `start`.
        """
        ...


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory on this machine, with the EOS ids of all its configuration files.

    Raises `ConfigError` when the directory is missing, holds no tokenizer, or names no EOS token.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such tokenizer directory")
    for name in (*_HUGGING_FACE_FILES, _SENTENCEPIECE_FILE):
        refuse_pointer(folder / name)
    if any((folder / name).is_file() for name in _HUGGING_FACE_FILES):
        return HuggingFaceTokenizer(folder)
    # transformers would convert this file too, but drops the leading space that most such models add (5.12.1).
    if (folder / _SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(folder)
    expected = ", ".join((*_HUGGING_FACE_FILES, _SENTENCEPIECE_FILE))
    raise ConfigError(f"{folder}: no tokenizer found, expected one of {expected}")


class HuggingFaceTokenizer:
    """A `Tokenizer` that transformers loads."""

    def __init__(self, folder: Path) -> None:
        try:
            self.inner: PreTrainedTokenizerBase = _class_of(folder).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: cannot load the tokenizer: {' '.join(str(error).split())}") from error
        self.folder = folder
        self.vocab_size = len(self.inner)
        self.eos_ids = _eos_ids(folder, self.inner.eos_token_id)

    def encode(self, text: str, start: bool = False) -> list[int]:
        return self.encode_many([text], [start])[0]

    def encode_many(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        encoded = self.inner(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        bos = self.inner.bos_token_id
        # Asked of the tokenizer, because having a BOS token does not mean using it (Qwen); its EOS is never wanted.
        uses_bos = bos is not None and self.inner.encode("", add_special_tokens=True)[:1] == [bos]
        # A text that was rendered elsewhere may begin with it already.
        return [
            [bos, *ids] if uses_bos and start and ids[:1] != [bos] else ids
            for ids, start in zip(encoded, starts, strict=True)
        ]

    @property
    def identity(self) -> str:
        return _hash_of(self.folder)

    @property
    def template(self) -> Any:
        return self.inner.chat_template

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render_chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        if self.inner.chat_template is None:
            raise _no_template(self.folder)
        try:
            return str(
                self.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template of {self.folder} refuses the messages: {error}") from error


class SentencePieceTokenizer:
    """A `Tokenizer` of SentencePiece's own: no chat template."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_file=str(folder / _SENTENCEPIECE_FILE))
        except RuntimeError as error:
            raise ConfigError(f"{folder / _SENTENCEPIECE_FILE}: not a SentencePiece model: {error}") from error
        self.vocab_size: int = self.inner.get_piece_size()
        self.eos_ids = _eos_ids(folder, _defined(self.inner.eos_id()))

    def encode(self, text: str, start: bool = False) -> list[int]:
        return self.encode_many([text], [start])[0]

    def encode_many(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        bos = _defined(self.inner.bos_id())
        encoded = self.inner.encode(list(texts))
        return [[bos, *ids] if start and bos is not None else ids for ids, start in zip(encoded, starts, strict=True)]

    @property
    def identity(self) -> str:
        return _hash_of(self.folder)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode([token for token in ids if token < self.vocab_size]))

    @property
    def template(self) -> Any:
        return None

    def render_chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        raise _no_template(self.folder)


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for end in _SMALL for file in folder.glob(f"*{end}")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _class_of(folder: Path) -> Any:
    """For a tokenizer.json that says to be taken as it stands, the class that does.

    AutoTokenizer (5.12.1) goes by config.json's model_type instead: beside a Qwen2 model it takes the vocabulary alone.
    """
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    named = _read(folder / "tokenizer_config.json").get("tokenizer_class")
    return PreTrainedTokenizerFast if named in generic and (folder / "tokenizer.json").is_file() else AutoTokenizer


def _no_template(folder: Path) -> ConfigError:
    return ConfigError(f"{folder}: the tokenizer has no chat template, but a prompt is a list of messages or needs one")


def _defined(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None  # SentencePiece's -1: no such token


def _eos_ids(folder: Path, own: int | None) -> tuple[int, ...]:
    found = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        value = _read(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ConfigError(f"{folder / name}: expected eos_token_id to be a token id or several, found {value!r}")
        found += ids
    if not found:
        raise ConfigError(f"{folder}: no EOS token in the tokenizer, generation_config.json or config.json")
    return tuple(dict.fromkeys(found))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
