"""Tokenizers from directories of every kind that we read."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from treepo_mcore.config import ConfigError
from treepo_mcore.data.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def hugging_face(tmp_path):
    """Words a, b, [user] and so on; BOS put in front, as Llama does."""
    words = ["<unk>", "<s>", "</s>", "<stop>", "a", "b", "[user]", "[assistant]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<stop>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write(tmp_path / "tokenizer_config.json", {**config, "chat_template": TEMPLATE})
    return tmp_path


@pytest.fixture
def sentencepiece_only(tmp_path):
    """A model as Llama 2 ships: BPE with byte fallback, a space added in front."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a cat and a mat"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        minloglevel=2,
    )
    return tmp_path


def write(file, content):
    file.write_text(json.dumps(content))


def test_hugging_face_encodes_with_bos_only_where_asked(hugging_face):
    tokenizer = load_tokenizer(hugging_face)
    assert tokenizer.encode("a b") == [4, 5]
    assert tokenizer.encode("a b", start=True) == [1, 4, 5]
    assert tokenizer.decode([1, 4, 5, 2]) == "a b"
    assert tokenizer.vocab_size == 8


def test_a_tokenizer_json_beside_a_qwen2_model_is_taken_as_it_stands(hugging_face):
    """transformers by itself would make a Qwen2Tokenizer of it, in which no text has any tokens."""
    write(hugging_face / "config.json", {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    assert load_tokenizer(hugging_face).encode("a b") == [4, 5]


def test_a_text_that_begins_with_bos_gets_no_second_one(hugging_face):
    tokenizer = load_tokenizer(hugging_face)
    bos = tokenizer.inner.bos_token
    assert tokenizer.encode(f"{bos}ab", start=True) == tokenizer.encode("ab", start=True)


def test_bos_that_is_defined_but_not_used_is_not_added(hugging_face):
    content = json.loads((hugging_face / "tokenizer.json").read_text())
    content["post_processor"] = None
    write(hugging_face / "tokenizer.json", content)
    assert load_tokenizer(hugging_face).encode("a b", start=True) == [4, 5]


def test_eos_ids_of_all_files_the_tokenizers_own_first(hugging_face):
    assert load_tokenizer(hugging_face).eos_ids == (2,)
    write(hugging_face / "generation_config.json", {"eos_token_id": [3, 2]})
    write(hugging_face / "config.json", {"model_type": "llama", "eos_token_id": 4})
    assert load_tokenizer(hugging_face).eos_ids == (2, 3, 4)


def test_no_eos_is_an_error(hugging_face):
    write(hugging_face / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(hugging_face)


def test_chat_template(hugging_face):
    tokenizer = load_tokenizer(hugging_face)
    text = tokenizer.render_chat([{"role": "user", "content": "a"}], {})
    assert text == "[user] a [assistant]"
    assert tokenizer.encode(text) == [6, 4, 7]


def test_missing_chat_template(hugging_face, sentencepiece_only):
    write(hugging_face / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(hugging_face).render_chat([{"role": "user", "content": "a"}], {})


def test_sentencepiece_gives_its_own_ids(sentencepiece_only):
    tokenizer = load_tokenizer(sentencepiece_only)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_only / "tokenizer.model"))
    for text in ("the cat sat", "dog \N{SNOWMAN}"):
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.encode(text, start=True) == [own.bos_id(), *own.encode(text)]
        assert tokenizer.decode([own.bos_id(), *own.encode(text), own.eos_id()]) == text
    assert tokenizer.vocab_size == 290
    assert tokenizer.eos_ids == (own.eos_id(),)
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}], {})


@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece_only"])
def test_ids_outside_the_tokenizer_have_no_text(kind, request):
    """A model may have more words than its tokenizer."""
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    first, *rest = tokenizer.encode("a b")
    assert tokenizer.decode([first, tokenizer.vocab_size, *rest, tokenizer.vocab_size + 7]) == "a b"


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no such tokenizer directory"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no tokenizer found, expected one of tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
