"""Rows of JSONL and parquet files, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data.tokenizer import Message, Tokenizer
from treepo_mcore.rewards.math import final_answer

Row = dict[str, Any]
FORMATS = (".jsonl", ".parquet")
MARKS = {"gsm8k": "line that begins with ####", "boxed": r"\boxed{}"}
_GSM8K = re.compile(r"^####(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Parsed:
    """A row, rendered and checked, before it is tokens."""

    place: str  # "<file>: line N"
    id: str
    text: str
    start: bool  # the text wants the tokenizer's BOS, where it uses one
    answer: Any
    meta: Row
    digest: str


def rows_of(file: Path) -> Iterator[tuple[str, Row]]:
    """Pairs of "<file>: line N" and the row."""
    check_format(file)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    return _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def check_format(file: Path) -> None:
    """Raise `ConfigError` where the name is of neither format; the file may be elsewhere."""
    if file.suffix not in FORMATS:
        raise ConfigError(f"{file}: expected {' or '.join(FORMATS)}, found {file.suffix or 'no extension'}")


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}: line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}: line {number}: expected a JSON object, found {type(row).__name__}")
            yield f"{file}: line {number}", row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: not valid parquet: {error}") from error


def parse(
    row: Row,
    place: str,
    default_id: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    any_answer: bool,
    taught: bool = False,
) -> Parsed:
    """Look a row's columns up and render its prompt. Raises `ConfigError` that names the place.

    any_answer, taught: see `prepared.load_prompts`.
    """
    content = _lookup(row, config.prompt_key, place)
    answer = _lookup(row, config.answer_key, place)
    if config.answer_key == config.prompt_key:
        content, answer = _conversation(content, config.prompt_key, place)
    answer = _found(answer, place, config, any_answer or taught)
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ConfigError(f"{place}: expected {config.answer_key} to be a string or a number, found {answer}")
    if isinstance(answer, str) and not answer.strip():
        raise ConfigError(f"{place}: {config.answer_key} is empty")
    if not any_answer and (not isinstance(answer, str | int | float) or isinstance(answer, bool)):
        expected = f"expected {config.answer_key} to be a string or a number"
        raise ConfigError(f"{place}: {expected}, found {type(answer).__name__}")
    answer = answer if isinstance(answer, list | dict) else str(answer)
    messages = _messages(content, place, config)
    try:
        text = content if messages is None else tokenizer.render_chat(messages, config.chat_template_kwargs)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    _check_unicode(text, config.prompt_key, place)
    written = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    _check_unicode(written, config.answer_key, place)
    if not text.strip():
        raise ConfigError(f"{place}: the prompt is empty")
    used = (config.prompt_key, config.answer_key)
    meta = {key: value for key, value in row.items() if key not in used}
    own = default_id if row.get("id") is None else str(row["id"])  # parquet fills gaps with null
    _check_unicode(own, "id", place)
    digest = hashlib.sha256(json.dumps([content, answer], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Parsed(place, own, text, messages is None, answer, meta, digest)


def _conversation(content: Any, key: str, place: str) -> tuple[Any, str]:
    """The messages before the assistant's last one, and that one's text."""
    if not _is_message_list(content) or len(content) < 2 or content[-1]["role"] != "assistant":
        expected = "a list of messages that ends with one of the assistant, which is the answer"
        raise ConfigError(f"{place}: expected {key} to be {expected}, found {str(content)[:80]}")
    return content[:-1], content[-1]["content"]


def _found(answer: Any, place: str, config: DataConfig, any_answer: bool) -> Any:
    """What the answer column says, or the part of it that `data.answer_from` names."""
    if config.answer_from == "column":
        if not any_answer and isinstance(answer, str) and _GSM8K.search(answer):
            raise ConfigError(
                f"{place}: {config.answer_key} is a whole solution in the form of GSM8K, which no answer equals; "
                "expected data.answer_from: gsm8k"
            )
        return answer
    if not isinstance(answer, str):
        found = type(answer).__name__
        raise ConfigError(f"{place}: expected {config.answer_key} to be text for data.answer_from, found {found}")
    if config.answer_from == "gsm8k":
        marks = _GSM8K.findall(answer)
        part = marks[-1].strip() if marks else None
    else:
        part = final_answer(answer)
    if part is None:
        raise ConfigError(f"{place}: no {MARKS[config.answer_from]} in {config.answer_key}, found {answer[-80:]!r}")
    return part


def _lookup(row: Row, key: str, place: str) -> Any:
    """A column, or a dotted path into nested ones. A null counts as missing: parquet fills gaps with them."""
    value: Any = row.get(key)
    if value is None:
        value = row
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        if key in row:
            raise ConfigError(f"{place}: {key!r} is null")
        raise ConfigError(f"{place}: no {key!r}, found {', '.join(row)}")
    return value


def _check_unicode(text: str, key: str, place: str) -> None:
    """Half a surrogate pair, as a cut emoji leaves it in JSON, is no character: it cannot be encoded or written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at character {error.start}"
        raise ConfigError(f"{place}: {key} is not valid Unicode: {found}") from error


def _messages(content: Any, place: str, config: DataConfig) -> list[Message] | None:
    """The messages for the chat template, or None where the string is used as it stands."""
    if isinstance(content, str):
        if _is_json_of_messages(content):
            raise ConfigError(
                f"{place}: {config.prompt_key} is a JSON text of messages; expected the list itself, not its text"
            )
        if config.chat_template != "always":
            return None
        messages = [{"role": "user", "content": content}]
    elif not _is_message_list(content):
        expected = (
            f"expected {config.prompt_key} to be a string or a list of messages whose role and content are strings"
        )
        raise ConfigError(f"{place}: {expected}, found {str(content)[:80]}")
    elif config.chat_template == "never":
        raise ConfigError(f"{place}: {config.prompt_key} is a list of messages, but data.chat_template is never")
    elif content[-1]["role"] == "assistant":
        raise ConfigError(
            f"{place}: {config.prompt_key} ends with an answer of the assistant; expected the messages before it, or "
            f"data.answer_key: {config.prompt_key}"
        )
    else:
        messages = content
    if config.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(f"{place}: has a system message, and data.system_prompt would be a second one")
    return [{"role": "system", "content": config.system_prompt}, *messages]


def _is_json_of_messages(text: str) -> bool:
    if not text.lstrip().startswith("[{"):
        return False
    try:
        return _is_message_list(json.loads(text))
    except ValueError:
        return False


def _is_message_list(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in content)
    )
