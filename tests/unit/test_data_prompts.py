"""Reading prompts, and the stream that hands them out."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from treepo_mcore.config import ConfigError, DataConfig
from treepo_mcore.data.prompts import Prompt, PromptStream, check_token_ids, load_prompts, rendering_of


class Words:
    """A tokenizer of one id per word; BOS is 0."""

    vocab_size = 100
    eos_ids = (1,)

    def encode(self, text, start=False):
        return [0] * start + [2 + len(word) for word in text.split()]

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
    return load_prompts(file, DataConfig(train=file, **options), Words())


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
            load_prompts(file, DataConfig(train=file), Words())


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
    config = DataConfig(train=tmp_path)
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


def make(count, answer="1"):
    return [Prompt(str(i), [i], str(i), answer, digest=f"{i} {answer}") for i in range(count)]


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
        (PromptStream(make(8), seed=1, shuffle=True), "rows of data.train, by hash"),
        (PromptStream(make(7, "2"), seed=1, shuffle=True), "rows of data.train, by hash"),
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
            visits.append(stream.state_dict()["epoch"])
        stream.saw({prompt.id: prompt.id == "2" and len(visits) < 5})
        resumed = PromptStream(make(4), seed=1, shuffle=True, longest_rest=3)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        stream = resumed
    assert visits[:7] == [0, 2, 5, 9, 13, 14, 15]  # the fifth time its answers differed


def test_an_epoch_in_which_all_prompts_rest_is_passed_over():
    stream = PromptStream(make(3), seed=1, shuffle=True, longest_rest=1)
    first = stream.next(3)
    stream.saw({prompt.id: True for prompt in first})
    assert stream.resting == 3
    assert sorted(ids(stream.next(3))) == sorted(ids(first))
    assert stream.state_dict()["epoch"] == 2


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
    prompts = load_prompts(file, DataConfig(train=file), Words(), any_answer=True)
    assert [prompt.answer for prompt in prompts] == [["7", "seven"], {"target": [7]}, "7", "7"]
    file.write_text(json.dumps({"prompt": "a", "answer": {"target": ["\ud83d"]}}))
    with pytest.raises(ConfigError, match="line 1: answer is not valid Unicode"):
        load_prompts(file, DataConfig(train=file), Words(), any_answer=True)


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
