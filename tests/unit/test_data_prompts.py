"""Reading prompts, and the stream that hands them out."""

import datetime
import fcntl
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data import prepared
from treepo_mcore.data.prepared import Prompt, load_prompts
from treepo_mcore.data.prompts import PromptStream, TrainingSets, check_token_ids, rendering_of


class Words:
    """A tokenizer of one id per word; BOS is 0."""

    vocab_size = 100
    eos_ids = (1,)

    def encode(self, text, start=False):
        return [0] * start + [2 + len(word) for word in text.split()]

    identity = "words"

    def encode_many(self, texts, starts):
        return [self.encode(text, start) for text, start in zip(texts, starts, strict=True)]

    def decode(self, ids):
        return " ".join("x" * (i - 2) for i in ids if i > 2)

    template = "words"

    def render_chat(self, messages, options):
        said = " ".join(f"<{m['role']}> {m['content']}" for m in messages)
        return " ".join([said, *map(str, options.values()), "<assistant>"])


def load(file, rows, **options):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load_prompts(file, DataConfig(train=file, cache_dir=file.parent / "cache", **options), Words())


def test_the_hash_is_that_of_ids_prompts_and_answers(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "id": "x"}, {"prompt": "b", "answer": "2", "id": "y"}]
    first = load(tmp_path / "a.jsonl", rows).digest
    assert load(tmp_path / "b.jsonl", [row | {"level": 3} for row in rows]).digest == first
    for changed in (rows[:1], rows[::-1], [rows[0], rows[1] | {"answer": "3"}], [rows[0], rows[1] | {"id": "z"}]):
        assert load(tmp_path / "c.jsonl", changed).digest != first


def test_a_file_is_prepared_once_for_what_it_is(tmp_path, monkeypatch):
    """Its bytes, the settings and the tokenizer decide; of a million rows only those asked for are read."""
    made = []
    prepare = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *given: made.append(given[0]) or prepare(*given))
    rows = [{"prompt": f"a{i}", "answer": i, "row": {"n": [i]}} for i in range(2500)]
    first = load(tmp_path / "a.jsonl", rows)
    again = load(tmp_path / "a.jsonl", rows)
    assert len(made) == 1
    assert list(again) == list(first)
    assert (len(again), again[-1].id, again[2400].meta, again[-1].index) == (
        2500,
        "a-2499",
        {"row": {"n": [2400]}},
        2499,
    )
    load(tmp_path / "a.jsonl", rows[:-1])
    load(tmp_path / "a.jsonl", rows, chat_template="always")
    monkeypatch.setattr(Words, "identity", "other words")
    load(tmp_path / "a.jsonl", rows)
    assert len(made) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"x" * len(data), lambda data: b""])
def test_a_damaged_cache_is_told_and_made_again(tmp_path, caplog, damage):
    rows = [{"prompt": "a b", "answer": "1"}] * 20
    before = list(load(tmp_path / "a.jsonl", rows))
    (made,) = (tmp_path / "cache").glob("*.arrow")
    made.write_bytes(damage(made.read_bytes()))
    assert list(load(tmp_path / "a.jsonl", rows)) == before
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{made} is damaged and made again: ")


def test_who_needs_what_another_process_prepares_waits_for_it(tmp_path, caplog):
    rows = [{"prompt": "a b", "answer": "1"}]
    load(tmp_path / "a.jsonl", rows)
    (lock,) = (tmp_path / "cache").glob("*.lock")
    with lock.open("w") as held, ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO):
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(load, tmp_path / "a.jsonl", rows)
        while not caplog.records:
            time.sleep(0.01)
        assert not waiting.done()
        fcntl.flock(held, fcntl.LOCK_UN)
        assert len(waiting.result(10)) == 1
    assert caplog.records[0].getMessage().endswith("a.jsonl: waiting for another process that prepares its prompts")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*cache cannot be written: File exists"):
        load(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}])


def test_what_is_not_json_in_a_parquet_row_becomes_text(tmp_path):
    day = datetime.date(2026, 11, 27)
    (prompt,) = load(tmp_path / "a.parquet", [{"prompt": "a", "answer": "1", "day": day}])
    assert prompt.meta["day"] == "2026-11-27"


CHAT = [{"role": "user", "content": "what is it"}]


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_strings_are_used_as_they_stand(tmp_path, name):
    rows = [{"prompt": "a bb", "answer": "7", "id": "first", "level": 3}, {"prompt": "ccc", "answer": "8"}]
    first, second = load(tmp_path / name, rows)
    assert first.id == "first"
    assert (first.tokens, first.text, first.answer) == ([0, 3, 4], "a bb", "7")
    assert first.meta["level"] == 3
    assert second.text == "ccc"


def test_rows_without_id_are_named_by_file_and_row(tmp_path):
    prompts = load(
        tmp_path / "math.jsonl", [{"prompt": "a", "answer": 7}, "", {"id": None, "prompt": "b", "answer": 0.5}]
    )
    assert [prompt.id for prompt in prompts] == ["math-0", "math-1"]
    assert [prompt.answer for prompt in prompts] == ["7", "0.5"]


def test_an_id_names_the_prompt_and_reaches_the_reward(tmp_path):
    (prompt,) = load(tmp_path / "math.jsonl", [{"id": 12, "prompt": "a", "answer": 7, "level": 3}])
    assert prompt.id == "12"
    assert prompt.meta == {"id": 12, "level": 3}


def test_verl_parquet(tmp_path):
    row = {"prompt": CHAT, "reward_model": {"ground_truth": "42", "style": "rule"}, "data_source": "x"}
    (prompt,) = load(tmp_path / "verl.parquet", [row], answer_key="reward_model.ground_truth")
    assert prompt.text == "<user> what is it <assistant>"
    assert prompt.tokens[0] != 0  # the template brings its own special tokens
    assert prompt.answer == "42"
    assert prompt.meta["data_source"] == "x"


def test_chat_template_modes(tmp_path):
    file = tmp_path / "data.jsonl"
    row = {"prompt": "a", "answer": "1"}
    assert load(file, [row], chat_template="always")[0].text == "<user> a <assistant>"
    assert load(file, [row], system_prompt="think")[0].text == "a"
    assert load(file, [row], chat_template="always", system_prompt="think")[0].text == (
        "<system> think <user> a <assistant>"
    )
    with pytest.raises(ConfigError, match=r"line 1: prompt is a list of messages, but data\.chat_template is never"):
        load(file, [{"prompt": CHAT, "answer": "1"}], chat_template="never")
    system = [{"role": "system", "content": "s"}, *CHAT]
    with pytest.raises(ConfigError, match="line 1: has a system message"):
        load(file, [{"prompt": system, "answer": "1"}], system_prompt="think")


def test_parquet_that_is_damaged(tmp_path):
    file = tmp_path / "data.parquet"
    load(file, [{"prompt": "a b c", "answer": "1"}] * 50)
    whole = file.read_bytes()
    for content in (whole[:40] + bytes(60) + whole[100:], whole[:-200]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"data.parquet: not valid parquet: "):
            load_prompts(file, DataConfig(train=file, cache_dir=file.parent / "cache"), Words())


def test_ids_beyond_the_embedding(tmp_path):
    prompts = load(tmp_path / "data.jsonl", [{"prompt": "a bb", "answer": "1"}])
    check_token_ids(prompts, 5)
    with pytest.raises(ConfigError, match=r"prompt data-0: token id 4 .* vocabulary has 4 words"):
        check_token_ids(prompts, 4)


GOOD = {"prompt": "a", "answer": "1"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no prompts in it"),
        ([GOOD, "{bad"], "line 2: not valid JSON"),
        ([GOOD, "", "[1]"], "line 3: expected a JSON object, found list"),
        ([GOOD, {"answer": "1"}], "line 2: no 'prompt', found answer"),
        ([{"prompt": "a"}], "line 1: no 'answer', found prompt"),
        ([{"prompt": "a", "answer": None}], "line 1: 'answer' is null"),
        ([{"prompt": "a", "answer": ["1"]}], "line 1: expected answer to be a string or a number, found list"),
        ([{"prompt": "a", "answer": True}], "line 1: expected answer to be a string or a number, found bool"),
        ([{"prompt": 3, "answer": "1"}], "line 1: expected prompt to be a string or a list of messages"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "line 1: expected prompt to be"),
        ([{"prompt": [], "answer": "1"}], "line 1: expected prompt to be"),
        ([{"prompt": [{"role": "user", "content": None}], "answer": "1"}], "whose role and content are strings"),
        ([{"prompt": [{"role": "user", "content": [{"text": "a"}]}], "answer": "1"}], "whose role and content"),
        ([{**GOOD, "id": 5}, {**GOOD, "id": "5"}], "line 2: id '5' is already used at .*line 1"),
        (
            [GOOD, {"prompt": "a a a a a", "answer": "1"}],
            r"line 2: the prompt has 6 tokens, data.max_prompt_tokens is 4",
        ),
    ],
)
def test_bad_files(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "data.jsonl", rows, max_prompt_tokens=4)
    assert "data.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_paths(tmp_path):
    config = DataConfig(train=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.csv: expected \.jsonl or \.parquet, found \.csv"):
        load_prompts(tmp_path / "data.csv", config, Words())
    with pytest.raises(ConfigError, match="no such file"):
        load_prompts(tmp_path / "data.jsonl", config, Words())
    (tmp_path / "data.parquet").write_text("no")
    with pytest.raises(ConfigError, match="not valid parquet"):
        load_prompts(tmp_path / "data.parquet", config, Words())
    with pytest.raises(ConfigError, match="row 2: 'answer' is null"):
        load(tmp_path / "data.parquet", [GOOD, {"prompt": "a", "answer": None}])


def test_overlong_prompts_are_dropped_and_counted_once(tmp_path, caplog):
    rows = [GOOD, {"prompt": "a a a a", "answer": "1"}, {"prompt": "a a a a a", "answer": "1"}]
    with caplog.at_level(logging.WARNING):
        prompts = load(tmp_path / "data.jsonl", rows, max_prompt_tokens=4, overlong_prompts="drop")
    assert [prompt.id for prompt in prompts] == ["data-0"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'data.jsonl'}: dropped 2 prompts longer than 4 tokens"
    ]
    with pytest.raises(ConfigError, match="no prompts left, 2 were too long"):
        load(tmp_path / "data.jsonl", rows[1:], max_prompt_tokens=4, overlong_prompts="drop")


def make(count):
    return [Prompt(str(i), [i], str(i), "1", index=i) for i in range(count)]


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_every_epoch_is_another_permutation():
    stream = PromptStream(make(20), seed=3, shuffle=True)
    first, second = ids(stream.next(20)), ids(stream.next(20))
    assert sorted(first) == sorted(second) == sorted(ids(make(20)))
    assert first != second
    assert first == ids(PromptStream(make(20), seed=3, shuffle=True).next(20))
    assert first != ids(PromptStream(make(20), seed=4, shuffle=True).next(20))


def test_without_shuffling_the_order_is_the_files():
    assert ids(PromptStream(make(3), seed=0, shuffle=False).next(8)) == list("01201201")


def test_the_size_of_the_requests_does_not_matter():
    whole = ids(PromptStream(make(7), seed=1, shuffle=True).next(30))
    stream = PromptStream(make(7), seed=1, shuffle=True)
    assert [i for n in (1, 6, 7, 0, 16) for i in ids(stream.next(n))] == whole


@pytest.mark.parametrize("taken", [0, 5, 7, 11, 14])
def test_resume_continues_with_the_same_prompts(taken):
    stream = PromptStream(make(7), seed=1, shuffle=True)
    stream.next(taken)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(make(7), seed=1, shuffle=True)
    resumed.load_state_dict(state)
    assert ids(resumed.next(20)) == ids(stream.next(20))


@pytest.mark.parametrize(
    ("stream", "key"),
    [
        (PromptStream(make(7), seed=2, shuffle=True), "run.seed: found 2, the checkpoint has 1"),
        (PromptStream(make(7), seed=1, shuffle=False), "data.shuffle"),
        (PromptStream(make(7), seed=1, shuffle=True, digest="x"), "rows and weights of data.train, by hash: found x"),
        (PromptStream(make(7), 1, True, {"template": "x"}), "chat template of the tokenizer, by hash: found x"),
    ],
)
def test_resume_refuses_another_stream(stream, key):
    state = PromptStream(make(7), seed=1, shuffle=True).state_dict()
    with pytest.raises(ConfigError, match=f"cannot resume the prompts: {key}"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("taken", [0, 5, 7])
def test_a_peek_moves_nothing(taken):
    stream = PromptStream(make(7), seed=1, shuffle=True)
    stream.next(taken)
    stream.put_back(stream.peek(2))
    seen = ids(stream.peek(12))
    assert seen == ids(stream.next(12))


def test_returned_prompts_come_first_and_survive_a_resume():
    stream = PromptStream(make(7), seed=1, shuffle=True)
    taken = stream.next(4)
    stream.put_back([taken[1], taken[3]])
    resumed = PromptStream(make(7), seed=1, shuffle=True)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    expected = [taken[1].id, taken[3].id, *ids(PromptStream(make(7), seed=1, shuffle=True).next(10))[4:]]
    assert ids(stream.next(8)) == ids(resumed.next(8)) == expected


def test_prompts_whose_answers_agree_rest_and_come_back():
    """After one epoch, then two, then three and not four, the longest; a resumed stream goes on alike."""
    stream = PromptStream(make(4), seed=1, shuffle=True, longest_rest=3)
    visits = []
    for _ in range(60):
        (prompt,) = stream.next(1)
        if prompt.id == "2":
            visits.append(stream.state_dict()["places"][0]["epoch"])
        stream.saw({prompt.index: prompt.id == "2" and len(visits) < 5})
        resumed = PromptStream(make(4), seed=1, shuffle=True, longest_rest=3)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        stream = resumed
    assert visits[:7] == [0, 2, 5, 9, 13, 14, 15]  # the fifth time its answers differed


def test_an_epoch_in_which_all_prompts_rest_is_passed_over():
    stream = PromptStream(make(3), seed=1, shuffle=True, longest_rest=1)
    first = stream.next(3)
    stream.saw({prompt.index: True for prompt in first})
    assert stream.resting == 3
    assert sorted(ids(stream.next(3))) == sorted(ids(first))
    assert stream.state_dict()["places"][0]["epoch"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": NaN}', "line 1: expected answer to be a string or a number, found nan"),
        ('{"prompt": "a", "answer": Infinity}', "line 1: expected answer to be a string or a number, found inf"),
        ('{"prompt": "a", "answer": "  "}', "line 1: answer is empty"),
        ('{"prompt": " ", "answer": "1"}', "line 1: the prompt is empty"),
        ('{"prompt": "a \\ud83d", "answer": "1"}', r"line 1: prompt is not valid Unicode: '.ud83d' at character 2"),
        ('{"prompt": "a", "answer": "\\ud83d"}', "line 1: answer is not valid Unicode"),
        ('{"prompt": "a", "answer": "1", "id": "\\ud83d"}', "line 1: id is not valid Unicode"),
        (
            json.dumps({"prompt": json.dumps(CHAT), "answer": "1"}),
            "line 1: prompt is a JSON text of messages; expected",
        ),
        (
            json.dumps({"prompt": [*CHAT, {"role": "assistant", "content": "7"}], "answer": "1"}),
            "line 1: prompt ends with an answer of the assistant; expected the messages before it",
        ),
        ('{"prompt": "a", "answer": ["1"]}', "line 1: expected answer to be a string or a number, found list"),
    ],
)
def test_what_is_no_answer_or_no_text_is_refused_by_line(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "data.jsonl", [line])


def test_lists_and_objects_are_answers_of_a_function_that_takes_any(tmp_path):
    file = tmp_path / "data.jsonl"
    answers = [["7", "seven"], {"target": [7]}, 7, "7"]
    file.write_text("".join(json.dumps({"prompt": "a", "answer": answer}) + "\n" for answer in answers))
    prompts = load_prompts(file, DataConfig(train=file, cache_dir=file.parent / "cache"), Words(), any_answer=True)
    assert [prompt.answer for prompt in prompts] == [["7", "seven"], {"target": [7]}, "7", "7"]
    file.write_text(json.dumps({"prompt": "a", "answer": {"target": ["\ud83d"]}}))
    with pytest.raises(ConfigError, match="line 1: answer is not valid Unicode"):
        load_prompts(file, DataConfig(train=file, cache_dir=file.parent / "cache"), Words(), any_answer=True)


def test_options_reach_the_chat_template(tmp_path):
    (prompt,) = load(tmp_path / "data.jsonl", [{"prompt": CHAT, "answer": 1}], chat_template_kwargs={"think": "no"})
    assert prompt.text == "<user> what is it no <assistant>"


def test_a_template_with_todays_date_does_not_end_a_run(tmp_path):
    """What rows become may change overnight; rows and the template's text do not."""
    rows, streams = [{"prompt": CHAT, "answer": 1}], []
    for day in ("25", "26"):
        prompts = load(tmp_path / "data.jsonl", rows, chat_template_kwargs={"date": day})
        streams.append(PromptStream(prompts, 0, True, rendering_of(DataConfig(train="x"), Words())))
    assert streams[0].peek(1)[0].text != streams[1].peek(1)[0].text
    streams[1].load_state_dict(streams[0].state_dict())


CONVERSATION = [{"role": "user", "content": "one"}, {"role": "assistant", "content": r"so \boxed{7}"}]


@pytest.mark.parametrize(
    ("row", "options", "answer"),
    [
        ({"prompt": "a", "answer": "1 + 1 = 2\n#### 1,234"}, {"answer_from": "gsm8k"}, "1,234"),
        ({"prompt": "a", "answer": r"then \boxed{\frac{1}{2}}."}, {"answer_from": "boxed"}, r"\frac{1}{2}"),
        ({"prompt": CONVERSATION[:1], "answer": 5}, {}, "5"),
        ({"messages": CONVERSATION}, {"prompt_key": "messages", "answer_key": "messages"}, CONVERSATION[1]["content"]),
        (
            {"messages": CONVERSATION},
            {"prompt_key": "messages", "answer_key": "messages", "answer_from": "boxed"},
            "7",
        ),
        (
            {"prompt": CONVERSATION[:1], "data_source": "x", "reward_model": {"ground_truth": "9", "style": "rule"}},
            {"answer_key": "reward_model.ground_truth"},
            "9",
        ),
        ({"question": "a", "solution": "b"}, {"prompt_key": "question", "answer_key": "solution"}, "b"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_forms_that_people_have(tmp_path, form, row, options, answer):
    (prompt,) = load(tmp_path / f"a.{form}", [row], **options)
    assert prompt.answer == answer
    said = "<user> one <assistant>" if "messages" in row or isinstance(row.get("prompt"), list) else "a"
    assert prompt.text == said


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": "a", "answer": "no mark"}, {"answer_from": "gsm8k"}, "no line that begins with #### in answer"),
        ({"prompt": "a", "answer": "no mark"}, {"answer_from": "boxed"}, r"no \\boxed{} in answer, found 'no mark'"),
        (
            {"prompt": "a", "answer": 3},
            {"answer_from": "boxed"},
            "answer to be text for data.answer_from, found int",
        ),
        ({"prompt": "a", "answer": "x\n#### 3"}, {}, "a whole solution in the form of GSM8K.*answer_from: gsm8k"),
        ({"prompt": "a"}, {"answer_key": "prompt"}, "a list of messages that ends with one of the assistant"),
        ({"prompt": CONVERSATION[:1]}, {"answer_key": "prompt"}, "that ends with one of the assistant, which is the"),
        ({"prompt": CONVERSATION, "answer": "1"}, {}, "or data.answer_key: prompt"),
        ({"prompt": "a", "answer": "x\n####  "}, {"answer_from": "gsm8k"}, "answer is empty"),
    ],
)
def test_answers_that_are_not_where_they_should_be(tmp_path, row, options, words):
    with pytest.raises(ConfigError, match=words) as raised:
        load(tmp_path / "a.jsonl", [row], **options)
    assert str(raised.value).startswith(f"{tmp_path / 'a.jsonl'}: line 1: ")


@pytest.mark.parametrize(
    ("where", "tokens"), [("left", [5, 6, 7, 8, 9]), ("right", [0, 3, 4, 5, 6]), ("middle", [0, 3, 4, 8, 9])]
)
def test_overlong_prompts_are_cut_where_it_is_said(tmp_path, caplog, where, tokens):
    row = {"prompt": " ".join("x" * n for n in range(1, 8)), "answer": "1"}  # tokens 0, 3, 4, ... 9
    with caplog.at_level(logging.WARNING):
        (prompt,) = load(tmp_path / "a.jsonl", [row], max_prompt_tokens=5, overlong_prompts=where)
    assert prompt.tokens == tokens
    assert "cut 1 prompts longer than 5 tokens" in caplog.text


def test_prompts_that_are_held_out_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": text, "answer": "1"} for text in ("One  two", "three", "four", "five")]
    train = load(tmp_path / "train.jsonl", rows)
    digest = train.digest
    first = load(tmp_path / "eval.jsonl", [{"prompt": "one two ", "answer": "9"}, {"prompt": "six", "answer": "1"}])
    second = load(tmp_path / "more.jsonl", [{"prompt": "FOUR", "answer": "9"}, {"prompt": "one two", "answer": "9"}])
    assert train.leave_out(first.likenesses()) == 1
    assert train.leave_out(second.likenesses()) == 1
    assert [prompt.text for prompt in train] == ["three", "five"]
    assert [prompt.index for prompt in train] == [0, 1]
    assert train[-1].text == "five"
    assert train.digest != digest
    assert load(tmp_path / "train.jsonl", rows).leave_out(load(tmp_path / "train.jsonl", rows[3:]).likenesses()) == 1


def sets(tmp_path, **sizes):
    return {
        name: load(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}", "answer": "1"} for i in range(size)])
        for name, size in sizes.items()
    }


def mixed(tmp_path, weights, seed=1, **sizes):
    together = TrainingSets(sets(tmp_path, **sizes), weights)
    return PromptStream(together, seed, True, digest=together.identity, parts=together.parts)


def test_sets_are_drawn_by_their_weights_each_in_epochs_of_its_own(tmp_path):
    stream = mixed(tmp_path, {"a": 3.0, "b": 1.0}, a=5, b=7)
    taken = [prompt.id.split("/")[0] for prompt in stream.next(200)]
    for end in range(1, 201):
        assert abs(taken[:end].count("a") - 0.75 * end) <= 1
    again = mixed(tmp_path, {"a": 3.0, "b": 1.0}, a=5, b=7).next(200)
    of_b = [prompt.id for prompt in again if prompt.set == "b"]
    assert len(set(of_b[:7])) == len(set(of_b[7:14])) == 7
    assert of_b[:7] != of_b[7:14]
    assert {prompt.index for prompt in again if prompt.set == "a"} == set(range(5))
    assert {prompt.index for prompt in again if prompt.set == "b"} == set(range(5, 12))


def test_without_weights_every_prompt_comes_equally_often(tmp_path):
    taken = ids(mixed(tmp_path, {"a": None, "b": None}, a=2, b=6).next(80))
    assert {taken.count(one) for one in taken} == {10}
    assert len(set(taken)) == 8


@pytest.mark.parametrize("taken", [0, 5, 13, 40])
def test_a_mixture_that_is_resumed_goes_on_alike(tmp_path, taken):
    weights = {"a": 1.0, "b": 2.5, "c": 0.3}
    stream = mixed(tmp_path, weights, a=3, b=4, c=5)
    stream.next(taken)
    resumed = mixed(tmp_path, weights, a=3, b=4, c=5)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    ahead = ids(stream.peek(50))
    assert ids(resumed.next(50)) == ahead == ids(stream.next(50))
    with pytest.raises(ConfigError, match="rows and weights of data"):
        mixed(tmp_path, weights | {"a": 2.0}, a=3, b=4, c=5).load_state_dict(stream.state_dict())
    with pytest.raises(ConfigError, match="rows and weights of data"):
        mixed(tmp_path, weights, a=3, b=4, c=6).load_state_dict(stream.state_dict())


def test_prompts_of_a_set_rest_by_its_own_epochs(tmp_path):
    together = TrainingSets(sets(tmp_path, a=2, b=8), {"a": 1.0, "b": 1.0})
    stream = PromptStream(together, 1, True, longest_rest=1, parts=together.parts)
    first = stream.next(4)
    a = [prompt for prompt in first if prompt.set == "a"]
    stream.saw({a[0].index: True})
    assert stream.resting == 1
    later = [prompt.id for prompt in stream.next(8) if prompt.set == "a"]
    assert later[0] == a[1].id  # its second epoch has one prompt, its third both
    assert sorted(later[1:3]) == sorted(prompt.id for prompt in a)


def teach(file, rows, most, **options):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(file, DataConfig(train=file, cache_dir=file.parent / "cache", **options), Words(), taught=most)


def test_answers_that_the_model_is_to_say_are_tokens_with_an_end(tmp_path):
    rows = [{"prompt": "a", "answer": "xx xxx"}, {"messages": CONVERSATION}]
    (text,) = teach(tmp_path / "a.jsonl", rows[:1], 3)
    assert (text.tokens, text.taught) == ([0, 3], [4, 5, 1])
    keys = {"prompt_key": "messages", "answer_key": "messages"}
    (chat,) = teach(tmp_path / "b.jsonl", rows[1:], 5, **keys)
    assert chat.tokens == Words().encode("<user> one <assistant>")
    assert chat.taught == [*Words().encode(CONVERSATION[1]["content"]), 1]
    (again,) = load(tmp_path / "a.jsonl", rows[:1])
    assert again.taught == []  # nothing of the one file is taken for the other


def test_answers_that_are_too_long_to_be_said(tmp_path):
    rows = [{"prompt": "a", "answer": "x x x"}, {"prompt": "b", "answer": "x"}]
    with pytest.raises(ConfigError, match=r"a.jsonl: line 1: the answer has 4 tokens, the longest response has 3"):
        teach(tmp_path / "a.jsonl", rows, 3)
    (left,) = teach(tmp_path / "a.jsonl", rows, 3, overlong_prompts="drop")
    assert left.text == "b"
    with pytest.raises(ConfigError, match=r"line 1: expected answer to be a string or a number, found list"):
        teach(tmp_path / "a.jsonl", [{"prompt": "a", "answer": ["x"]}], 3)
