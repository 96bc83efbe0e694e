"""A SentencePiece tokenizer for the quickstart corpus, exported as a Hugging Face directory.

    python examples/quickstart/make_tokenizer.py --corpus data/quickstart/sft.jsonl --out data/quickstart/tokenizer

The folder holds `tokenizer.model` (SentencePiece itself) and `tokenizer.json` with its configuration: the same model
in the form that transformers and vLLM read. Numbers are split into digits, and `\\boxed{` is one token. Before anything
is written, both forms must give the same ids, and the text back, for the whole corpus.
"""

from __future__ import annotations

import argparse
import io
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPECIAL = UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0 to 3
WHOLE = ("\n", "\\boxed{")  # pieces never split: the first cannot be learned from lines, the second opens an answer
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def write_tokenizer(corpus_files: Sequence[str | Path], out: str | Path, vocab_size: int = 448) -> None:
    """Train on every string of the JSONL `corpus_files` that is a prompt or a solution; write the folder `out`.

    Raises `ValueError` when a text does not survive encoding and decoding, or the two forms disagree on it.
    """
    texts = list(dict.fromkeys(text for file in corpus_files for text in _texts(Path(file))))
    model = train(texts, vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = to_tokenizers(processor)
    check(processor, tokenizer, texts)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def train(texts: Sequence[str], vocab_size: int) -> bytes:
    """A BPE SentencePiece model that changes nothing in the text: no normalising, no added or removed spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars=string.digits + string.ascii_letters + string.punctuation,
        user_defined_symbols=list(WHOLE),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def to_tokenizers(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same BPE model in the `tokenizers` library: SentencePiece joins any two neighbours that make a piece."""
    ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    learned = [piece for piece in ids if piece not in (*SPECIAL, *WHOLE)]  # in the order in which they were learned
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=UNK, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in WHOLE])
    return tokenizer


def check(processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Both forms give the same ids for every text, and the text back."""
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        if encoding.ids != processor.encode(text):
            raise ValueError(f"{text!r}: tokenizer.json gives {encoding.ids}, SentencePiece {processor.encode(text)}")
        if tokenizer.decode(encoding.ids) != text or processor.decode(encoding.ids) != text:
            raise ValueError(f"{text!r}: decoded as {tokenizer.decode(encoding.ids)!r}")


def _texts(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("prompt", "solution"):
            if key in row:
                yield row[key]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's tokenizer.")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="JSONL files with prompt and solution")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=448)
    arguments = parser.parse_args()
    write_tokenizer(arguments.corpus, arguments.out, arguments.vocab_size)


if __name__ == "__main__":
    main()
