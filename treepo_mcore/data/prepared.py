"""Prompts of a file, checked and tokenised once a node and kept on disk: a million of them cost no process memory.

What was made of a file is an Arrow file in `data.cache_dir`, named by a hash of everything that went into it: the
file's bytes, the tokenizer's files, the settings, this code. All processes of a node map the same pages and read a row
when they draw it. The first process that needs it makes it while the others wait for a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import batched
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data.rows import Row, check_format, parse, rows_of
from treepo_mcore.data.tokenizer import Tokenizer
from treepo_mcore.system.environment import all_cores

logger = logging.getLogger(__name__)

ROWS = 1000  # tokenised at a time
OF_ROWS = ("prompt_key", "answer_key", "answer_from", "chat_template", "chat_template_kwargs", "system_prompt")
OF_LENGTH = ("max_prompt_tokens", "overlong_prompts")
CODE = ("prepared.py", "rows.py", "tokenizer.py")
TEXT = pa.string()
SCHEMA = pa.schema(
    [
        ("id", TEXT),
        ("tokens", pa.list_(pa.int32())),
        ("text", TEXT),
        ("answer", TEXT),
        ("meta", TEXT),
        ("digest", TEXT),
        ("taught", pa.list_(pa.int32())),
    ]
)
LIKENESS = pa.field("likeness", TEXT)  # equal for prompts that are the same up to case and white space


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the engine."""

    id: str  # the row's "id", else "<file stem>-<row>", rows from 0
    tokens: list[int]
    text: str  # what was encoded: after the chat template
    answer: Any  # text; for a function of the user's also a list or an object
    meta: Row = field(default_factory=dict)  # the row without prompt and answer
    digest: str = ""  # of prompt and answer as they stand in the row
    index: int = 0  # among the prompts of its file, or of all training sets
    taught: list[int] = field(default_factory=list)  # the answer's tokens and the end of text, for supervised training
    set: str = ""  # its training set's name, where there are several


@dataclass(frozen=True)
class About:
    """What is known of all prompts of a file together; beside the Arrow file, written when that is whole."""

    size: int  # bytes of the Arrow file
    digest: str  # of all ids, prompts and answers as they stand in the rows
    highest_token: int
    dropped: int  # for their length
    cut: int  # to the length that they may have


class Prompts(Sequence[Prompt]):
    """The prompts of a file, in its order; each is read from the disk when it is asked for."""

    def __init__(self, file: Path, about: About) -> None:
        self.digest, self.highest_token = about.digest, about.highest_token
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._kept: np.ndarray | None = None  # rows, where some are left out

    def likenesses(self) -> pa.Array:
        """Of all prompts; two that are the same up to case and white space have the same."""
        return self._table.column(LIKENESS.name).combine_chunks()

    def leave_out(self, likenesses: pa.Array) -> int:
        """Drop the prompts that are like one of these, for good; how many there were."""
        like = pc.is_in(self._table.column(LIKENESS.name), likenesses).to_numpy()
        kept = np.arange(self._table.num_rows) if self._kept is None else self._kept
        if number := int(like[kept].sum()):
            self._kept = kept[~like[kept]]
            self.digest = hashlib.sha256(self.digest.encode() + self._kept.tobytes()).hexdigest()[:16]
        return number

    def __len__(self) -> int:
        return int(self._table.num_rows) if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = index if self._kept is None else int(self._kept[index])
        row = {name: self._table.column(name)[place].as_py() for name in SCHEMA.names}
        row |= {name: json.loads(row[name]) for name in ("answer", "meta")}
        return Prompt(**row, index=index % len(self))


def load_prompts(
    path: str | Path, config: DataConfig, tokenizer: Tokenizer, any_answer: bool = False, taught: int = 0
) -> Prompts:
    """Prompts of a `.jsonl` or `.parquet` file; `prompt_key` and `answer_key` may be dotted paths into a row.

    any_answer: lists and objects are answers too, for a reward function that knows what to do with them.
    taught: the model is to say the answers, which then are text and have at most so many tokens with the one that ends
    them; a longer one is an error, or left out under `overlong_prompts: drop`.

    A prompt longer than `max_prompt_tokens` is an error, left out or cut, as `overlong_prompts` says. What is not JSON
    in a parquet row, such as a date, becomes text. Raises `ConfigError` naming file and line (parquet: row, from 1).
    """
    file = Path(path)
    check_format(file)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    folder = config.cache_dir or default_cache()
    made = folder / f"{_fingerprint(file, config, tokenizer, any_answer, taught)}.arrow"
    with _lock(made.with_suffix(".lock"), file):
        about = _about(made)
        if about is None:
            about = _prepare(file, config, tokenizer, any_answer, taught, made)
    for what, number in (("dropped", about.dropped), ("cut", about.cut)):
        if number:
            logger.warning("%s: %s %d prompts longer than %d tokens", file, what, number, config.max_prompt_tokens)
    return Prompts(made, about)


def default_cache() -> Path:
    """Where other caches are: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treepo_mcore" / "prompts"


def _fingerprint(file: Path, config: DataConfig, tokenizer: Tokenizer, any_answer: bool, taught: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        digest.update(hashlib.file_digest(content, "sha256").digest())
    for name in CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    settings = {name: getattr(config, name) for name in (*OF_ROWS, *OF_LENGTH)}
    template = json.dumps(tokenizer.template)
    today = date.today().isoformat() if "strftime_now" in template else None  # which a template may write
    # Ids of rows without one have the file's name in them.
    known = [file.name, settings, template, today, tokenizer.identity, any_answer, taught]
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


@contextmanager
def _lock(lock: Path, file: Path) -> Iterator[None]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise ConfigError(f"data.cache_dir: {lock.parent} cannot be written: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process that prepares its prompts", file)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _about(made: Path) -> About | None:
    """Of an Arrow file that is there and whole."""
    record = made.with_suffix(".json")
    if not record.is_file():
        return None
    try:
        about = About(**json.loads(record.read_text()))
        if made.stat().st_size != about.size:
            raise ValueError(f"found {made.stat().st_size} bytes, expected {about.size}")
        Prompts(made, about)
    except (ValueError, TypeError, OSError) as error:
        logger.warning("%s is damaged and made again: %s", made, error)
        return None
    return about


def _prepare(file: Path, config: DataConfig, tokenizer: Tokenizer, any_answer: bool, taught: int, made: Path) -> About:
    part, places = made.with_suffix(".part"), _Places(file)
    digest, highest, dropped, cut, kept = hashlib.sha256(), 0, 0, 0, 0
    schema = SCHEMA.append(LIKENESS)
    rows = (
        parse(row, place, f"{file.stem}-{index}", config, tokenizer, any_answer, bool(taught))
        for index, (place, row) in enumerate(rows_of(file))
    )
    with pa.OSFile(str(part), "wb") as target, pa.ipc.new_file(target, schema) as writer:
        for some in batched(rows, ROWS):
            columns: dict[str, list[Any]] = {name: [] for name in schema.names}
            with all_cores():
                encoded = tokenizer.encode_many([row.text for row in some], [row.start for row in some])
                said = tokenizer.encode_many([row.answer for row in some], [False] * len(some)) if taught else None
            for row, tokens, answer_tokens in zip(some, encoded, said or [[]] * len(some), strict=True):
                lesson = [*answer_tokens, tokenizer.eos_ids[0]] if taught else []
                places.add(row.id, row.place)
                if not tokens:
                    raise ConfigError(f"{row.place}: the prompt is empty")
                if config.overlong_prompts == "drop" and (
                    len(tokens) > config.max_prompt_tokens or len(lesson) > taught
                ):
                    dropped += 1
                    continue
                if len(lesson) > taught:
                    raise ConfigError(
                        f"{row.place}: the answer has {len(lesson)} tokens, the longest response has {taught}"
                    )
                if len(tokens) > config.max_prompt_tokens:
                    tokens = _shortened(tokens, config, row.place)
                    cut += 1
                digest.update(f"{row.id} {row.digest}\n".encode())
                highest = max(highest, *tokens, *lesson)
                answer, meta = json.dumps(row.answer), json.dumps(row.meta, default=str)
                likeness = hashlib.sha256(" ".join(row.text.casefold().split()).encode()).hexdigest()[:16]
                values = (row.id, tokens, row.text, answer, meta, row.digest, lesson, likeness)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
            kept += len(columns["id"])
            writer.write_table(pa.table(columns, schema=schema))
    if not kept:
        raise ConfigError(f"{file}: no prompts" + (f" left, {dropped} were too long" if dropped else " in it"))
    part.replace(made)
    about = About(made.stat().st_size, digest.hexdigest()[:16], highest, dropped, cut)
    made.with_suffix(".json").write_text(json.dumps(asdict(about)))
    return about


def _shortened(tokens: list[int], config: DataConfig, place: str) -> list[int]:
    """To `max_prompt_tokens`, without those at the end or in the midst that `overlong_prompts` names."""
    most = config.max_prompt_tokens
    match config.overlong_prompts:
        case "left":
            return tokens[-most:]
        case "right":
            return tokens[:most]
        case "middle":
            return tokens[: most - most // 2] + tokens[len(tokens) - most // 2 :]
        case _:
            raise ConfigError(f"{place}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens is {most}")


class _Places:
    """Where each id was met first."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, str] = {}

    def add(self, own: str, place: str) -> None:
        short = place.removeprefix(str(self.file))
        first = self.found.setdefault(own, short)
        if first != short:
            raise ConfigError(f"{place}: id {own!r} is already used at {self.file}{first}")
