"""The quickstart's problems and its tokenizer."""

import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import sentencepiece

from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.rewards.math import final_answer, quick_verdict

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_data = load_script("make_data")
make_tokenizer = load_script("make_tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    make_data.write_data(folder, seed=1, train_size=2000, eval_size=200)
    make_tokenizer.write_tokenizer([folder / "sft.jsonl"], folder / "tokenizer")
    return folder


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sizes_and_columns(folder):
    train, held_out, sft = (rows(folder / f"{name}.jsonl") for name in ("train", "eval", "sft"))
    assert (len(train), len(held_out), len(sft)) == (2000, 200, 2000)
    assert [set(part[0]) for part in (train, held_out, sft)] == [
        {"prompt", "answer", "solution"},
        {"prompt", "answer"},
        {"prompt", "solution", "style"},
    ]


def test_solutions_are_right(folder):
    numbers_in_prompt = re.compile(r"\d+")
    for row in rows(folder / "train.jsonl"):
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", row["solution"])
        assert 2 <= len(steps) <= 3
        known = set(numbers_in_prompt.findall(row["prompt"]))
        for left, sign, right, result in steps:
            assert {left, right} <= known, row
            assert (
                int(result)
                == {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
            )
            assert 1 <= int(result) <= make_data.LARGEST
            known.add(result)
        assert row["answer"] in known
        assert quick_verdict(row["solution"], row["answer"])


def test_styles(folder):
    answers = {row["prompt"]: row["answer"] for row in rows(folder / "train.jsonl")}
    counts = {"plain": 0, "told": 0, "hasty": 0}
    for row in rows(folder / "sft.jsonl"):
        counts[row["style"]] += 1
        assert final_answer(row["solution"]) == answers[row["prompt"]]
        assert ("=" in row["solution"]) == (row["style"] != "hasty")
        assert row["solution"].startswith(" ")
        assert row["prompt"].endswith("\nAnswer:")
    assert counts["plain"] == pytest.approx(counts["told"], abs=120)
    assert 700 < counts["hasty"] < 1300  # both kinds of kinds are there


def test_eval_is_disjoint_from_train(folder):
    def words_and_numbers(row):
        """The problem with names and things taken out: its template and numbers."""
        names = "|".join((*make_data.NAMES, *make_data.THINGS))
        return re.sub(rf"\b({names})\b", "_", row["prompt"])

    train = {words_and_numbers(row) for row in rows(folder / "train.jsonl")}
    held_out = {words_and_numbers(row) for row in rows(folder / "eval.jsonl")}
    assert len(train) == 2000
    assert not train & held_out


def test_equal_sums_are_one_expression():
    def term(number):
        return ((1, (number,)),)

    product = make_data._expand(term(3), "*", term(12))
    swapped = make_data._expand(term(12), "*", term(3))
    assert make_data._expand(product, "+", term(14)) == make_data._expand(term(14), "+", swapped)
    left = make_data._expand(make_data._expand(term(5), "+", term(7)), "-", term(2))
    right = make_data._expand(make_data._expand(term(5), "-", term(2)), "+", term(7))
    assert left == right
    assert make_data._expand(term(5), "-", term(7)) != make_data._expand(term(7), "-", term(5))


def test_no_two_problems_share_an_expression():
    problems = make_data.make_problems(random.Random(0), 3000)
    assert len({problem.expression for problem in problems}) == 3000
    for problem in problems[:200]:
        value = sum(sign * math.prod(factors) for sign, factors in problem.expression)
        assert value == problem.answer


def test_the_seed_decides_every_byte(folder, tmp_path):
    make_data.write_data(tmp_path, seed=1, train_size=2000, eval_size=200)
    for name in ("train.jsonl", "eval.jsonl", "sft.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_tokenizer_agrees_with_sentencepiece_and_gives_the_text_back(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    assert tokenizer.vocab_size == own.get_piece_size() == 448
    assert tokenizer.eos_ids == (own.eos_id(),) == (2,)
    texts = [row[key] for row in rows(folder / "sft.jsonl")[:500] for key in ("prompt", "solution")]
    texts += [row["prompt"] for row in rows(folder / "eval.jsonl")]
    texts += ["  two  spaces ", "}{\\boxed{{", "Unseen words, 1,000?", "\n\n", " \\frac{1}{2}"]
    for text in texts:
        assert tokenizer.encode(text, start=True) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == text


def test_prompt_and_solution_meet_at_a_token_border(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    for row in rows(folder / "sft.jsonl"):
        apart = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["solution"])
        assert apart == tokenizer.encode(row["prompt"] + row["solution"])


def test_pieces(folder):
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    space = make_tokenizer.SPACE
    assert own.encode(" 14+7=21. \\boxed{21}", out_type=str) == [
        *(space, "1", "4", "+", "7", "=", "2", "1", ".", space, "\\boxed{", "2", "1", "}")
    ]
    digits = [own.id_to_piece(i) for i in range(own.get_piece_size()) if re.search(r"\d", own.id_to_piece(i))]
    assert sorted(digits) == list("0123456789")


def test_lengths(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    sft = rows(folder / "sft.jsonl")
    prompts = [len(tokenizer.encode(row["prompt"])) for row in sft]
    careful = [len(tokenizer.encode(row["solution"])) for row in sft if row["style"] != "hasty"]
    assert 20 <= min(prompts) <= max(prompts) <= 40
    assert 15 <= min(careful) <= max(careful) <= 50


def test_chat_template_gives_the_prompt(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    prompt = rows(folder / "eval.jsonl")[0]["prompt"]
    question = prompt.removesuffix("\nAnswer:")
    assert tokenizer.render_chat([{"role": "user", "content": question}], {}) == prompt
