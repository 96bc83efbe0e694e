"""Prompts: read from JSONL or parquet, and drawn in an order that a resumed run continues."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data.tokenizer import Message, Tokenizer

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FORMATS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the engine."""

    id: str  # the row's "id", else "<file stem>-<row>", rows from 0
    tokens: list[int]
    text: str  # what was encoded: after the chat template
    answer: Any  # text; for a function of the user's also a list or an object
    meta: Row = field(default_factory=dict)  # the row without prompt and answer
    digest: str = ""  # of prompt and answer as they stand in the row


def load_prompts(path: str | Path, config: DataConfig, tokenizer: Tokenizer, any_answer: bool = False) -> list[Prompt]:
    """Read and encode a `.jsonl` or `.parquet` file; `prompt_key` and `answer_key` may be dotted paths into a row.

    any_answer: lists and objects are answers too, for a reward function that knows what to do with them.

    A prompt longer than `max_prompt_tokens` is an error or, under `overlong_prompts: drop`, left out. Raises
    `ConfigError` naming file and line (parquet: row, from 1).
    """
    file = Path(path)
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    dropped = 0
    for index, (place, row) in enumerate(_rows(file)):
        prompt = _prompt(row, place, f"{file.stem}-{index}", config, tokenizer, any_answer)
        if prompt.id in places:
            raise ConfigError(f"{place}: id {prompt.id!r} is already used at {places[prompt.id]}")
        places[prompt.id] = place
        if len(prompt.tokens) <= config.max_prompt_tokens:
            prompts.append(prompt)
        elif config.overlong_prompts == "drop":
            dropped += 1
        else:
            found, limit = len(prompt.tokens), config.max_prompt_tokens
            raise ConfigError(f"{place}: the prompt has {found} tokens, data.max_prompt_tokens is {limit}")
    if dropped:
        logger.warning("%s: dropped %d prompts longer than %d tokens", file, dropped, config.max_prompt_tokens)
    if not prompts:
        raise ConfigError(f"{file}: no prompts" + (f" left, {dropped} were too long" if dropped else " in it"))
    return prompts


def check_token_ids(prompts: Sequence[Prompt], vocab: int) -> None:
    """Raise `ConfigError` for a prompt with a token that the model, of `vocab` words, has no embedding of."""
    for prompt in prompts:
        highest = max(prompt.tokens)
        if highest >= vocab:
            raise ConfigError(
                f"prompt {prompt.id}: token id {highest} of the tokenizer, the model's vocabulary has {vocab} words"
            )


class PromptStream:
    """Prompts without end: every epoch is a permutation of all, drawn from (seed, epoch), or the file's order.

    Without those that rest: a prompt whose answers all agreed is passed over in the next epoch, then, each time that
    they agree again, in twice as many, up to `longest_rest` (docs/algorithm.md 2.12).
    """

    def __init__(
        self,
        prompts: list[Prompt],
        seed: int,
        shuffle: bool,
        rendering: Mapping[str, str] | None = None,
        longest_rest: int = 0,
    ) -> None:
        """rendering: how rows became text, see `rendering_of`; a resumed run has to have the same.

        longest_rest: in epochs.
        """
        if not prompts:
            raise ValueError("prompts: expected at least one")
        self._prompts = prompts
        self._index = {prompt.id: i for i, prompt in enumerate(prompts)}
        self._seed, self._shuffle = seed, shuffle
        self._identity = {"run.seed": seed, "data.shuffle": shuffle, "rows": _digest(prompts), **(rendering or {})}
        self._epoch, self._position = 0, 0
        self._order = self._draw()
        self._returned: list[int] = []
        self._longest_rest = longest_rest
        self._rests: dict[int, list[int]] = {}  # prompt -> times in a row that its answers agreed, first epoch back

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts, returned ones first; an epoch's end does not stop it."""
        taken = [self._prompts[i] for i in self._returned[:n]]
        del self._returned[:n]
        while len(taken) < n:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._draw()
            index = self._order[self._position]
            self._position += 1
            if self._rests.get(index, (0, 0))[1] <= self._epoch:
                taken.append(self._prompts[index])
        return taken

    def saw(self, agreed: Mapping[str, bool]) -> None:
        """Whether all answers to a prompt had the same score, by id."""
        if not self._longest_rest:
            return
        for prompt, same in agreed.items():
            index = self._index[prompt]
            if not same:
                self._rests.pop(index, None)
                continue
            times = self._rests.get(index, [0])[0] + 1
            self._rests[index] = [times, self._epoch + 1 + min(2 ** (times - 1), self._longest_rest)]

    @property
    def resting(self) -> int:
        """Prompts that would be passed over now."""
        return sum(back > self._epoch for _, back in self._rests.values())

    def peek(self, n: int) -> list[Prompt]:
        """What `next` would give; the stream stays where it is."""
        before = self._epoch, self._position, self._order, self._returned[:]
        taken = self.next(n)
        self._epoch, self._position, self._order, self._returned = before
        return taken

    @property
    def returned(self) -> int:
        """How many of the next prompts were put back."""
        return len(self._returned)

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Let these come again, before all others."""
        self._returned = [self._index[prompt.id] for prompt in prompts] + self._returned

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "returned": self._returned[:],
            "rests": [[index, *rest] for index, rest in self._rests.items()],
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `ConfigError` when rows, seed, order or rendering are not the same.

        Rows count as they stand in their file: a chat template that writes today's date changes nothing.
        """
        if not state.keys() >= self.state_dict().keys():
            expected = ", ".join(self.state_dict())
            raise ConfigError(f"cannot resume the prompts: expected {expected}, the checkpoint has {', '.join(state)}")
        saved = state["identity"]
        for key, ours in self._identity.items():
            if saved.get(key) != ours:
                raise ConfigError(
                    f"cannot resume the prompts: {WORDS.get(key, key)}: found {ours}, the checkpoint has "
                    f"{saved.get(key)}; put it back, or start a new run.dir"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._returned = list(state["returned"])
        self._rests = {index: [times, back] for index, times, back in state["rests"]}
        self._order = self._draw()

    def _draw(self) -> list[int]:
        count = len(self._prompts)
        if not self._shuffle:
            return list(range(count))
        order: list[int] = np.random.default_rng([self._seed, self._epoch]).permutation(count).tolist()
        return order


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id} {prompt.digest}\n".encode())
    return digest.hexdigest()[:16]


WORDS = {"rows": "rows of data.train, by hash", "template": "chat template of the tokenizer, by hash"}


def rendering_of(config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """What turns a row into text, besides the row."""
    settings = {
        f"data.{name}": json.dumps(getattr(config, name))
        for name in ("chat_template", "chat_template_kwargs", "system_prompt")
    }
    return settings | {"template": hashlib.sha256(json.dumps(tokenizer.template).encode()).hexdigest()[:16]}


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
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
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file}: not valid parquet: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{file}: row {number}", row


def _prompt(
    row: Row, place: str, default_id: str, config: DataConfig, tokenizer: Tokenizer, any_answer: bool
) -> Prompt:
    content = _lookup(row, config.prompt_key, place)
    answer = _lookup(row, config.answer_key, place)
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
    tokens = tokenizer.encode(text, start=messages is None)
    if not tokens or not text.strip():
        raise ConfigError(f"{place}: the prompt is empty")
    used = (config.prompt_key, config.answer_key)
    meta = {key: value for key, value in row.items() if key not in used}
    own = default_id if row.get("id") is None else str(row["id"])  # parquet fills gaps with null
    _check_unicode(own, "id", place)
    digest = hashlib.sha256(json.dumps([content, answer], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Prompt(own, tokens, text, answer, meta, digest)


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
            f"{place}: {config.prompt_key} ends with an answer of the assistant; expected the messages before it"
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
