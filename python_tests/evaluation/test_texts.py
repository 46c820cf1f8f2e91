"""Texts: read once, fingerprinted as read, and cut before they are tokenized."""

import contextlib
import hashlib
import os
import random
import threading
import tracemalloc

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from locas_ext.evaluation.assets import ASSETS, MODEL, read_book
from locas_ext.evaluation.text_file import TextFile
from locas_ext.evaluation.texts import check_readable, read_text, read_texts

NOVEL = (ASSETS / "nostromo.txt").read_text()


def trained(model, trainer, pre=None, normalizer=None, decoder=None):
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator([NOVEL[i : i + 200] for i in range(0, 60_000, 200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(name):
    """The kinds of tokenizers there are: with words first and without, by merges and by likelihood."""
    if name == "shipped":
        return AutoTokenizer.from_pretrained(MODEL)
    if name == "merges over the whole text":  # as SentencePiece's BPE
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"])
        whole = normalizers.Replace(" ", "▁")
        return trained(models.BPE(unk_token="<unk>"), trainer, normalizer=whole)
    if name == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>")
        return trained(models.Unigram(), trainer, pre=pre_tokenizers.Metaspace())
    if name == "word pieces":
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"])
        lower = normalizers.BertNormalizer(lowercase=True)
        return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre=pre_tokenizers.BertPreTokenizer(), normalizer=lower)
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return trained(
        models.BPE(), trainer, pre=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel(), normalizer=normalizers.NFC()
    )


KINDS = ["shipped", "bytes", "merges over the whole text", "unigram", "word pieces"]


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request):
    return make(request.param)


def random_text(numbers, size):
    """Prose, noise, long runs, line ends of all kinds, characters of several bytes and marks that combine."""
    pieces = [
        lambda: NOVEL[(at := numbers.randrange(len(NOVEL) - 400)) : at + numbers.randrange(400)],
        lambda: numbers.choice(" \n\tx\r-") * numbers.randrange(1, 300),
        lambda: "".join(map(chr, numbers.choices([*range(32, 127), 0x301, 0xE9, 0x4E2D, 0x1F600, 0x200D], k=60))),
        lambda: numbers.choice(["ab", "aba", "the", "\r\n", "1", "é"]) * numbers.randrange(1, 200),
    ]
    parts, length = [], 0
    while length < size:
        parts.append(numbers.choice(pieces)())
        length += len(parts[-1])
    return "".join(parts)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_tokens_are_those_of_the_whole_text(any_tokenizer, tmp_path, seed):
    numbers = random.Random(seed)
    text = random_text(numbers, 40_000)
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    text = file.read_text()  # line ends as they are read
    whole = any_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for count in (2, numbers.randrange(3, 100), numbers.randrange(100, 3000), len(whole["input_ids"])):
        read = read_text(file, any_tokenizer, count)
        assert read.ids.tolist() == whole["input_ids"][:count]
        offsets = whole["offset_mapping"][:count]
        scored = text[offsets[0][1] : offsets[-1][1]]
        assert (read.words, read.bytes) == (len(scored.split()), len(scored.encode()))
        assert read.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("line", ["abcdefgh", "a", " ", "the cat "])
def test_a_long_line_is_cut_before_it_is_tokenized(tmp_path, tokenizer, line):
    file = tmp_path / "line.txt"
    file.write_text(line * (20_000_000 // len(line)))
    seen = []

    def watching(text, **options):
        seen.append(len(text))
        return tokenizer(text, **options)

    watching.is_fast = True
    tracemalloc.start()
    text = read_text(file, watching, 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text.ids) == 500 and max(seen) < 1_000_000
    assert peak < 100 * 2**20
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_a_file_is_read_in_steps_as_at_once(tmp_path, seed):
    numbers = random.Random(seed)
    file = tmp_path / "a.txt"
    file.write_bytes(random_text(numbers, 3000).encode())
    with TextFile(file) as opened:
        while not opened.ended:
            before = opened.text
            opened.read_to(len(before) + numbers.randrange(1, 400))
            assert opened.text.startswith(before)
        assert opened.text == file.read_text()
        assert opened.digest() == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 9000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_text_are_named(tmp_path, tokenizer, place, mark):
    file = tmp_path / "bad.txt"
    file.write_bytes(mark + b"a" * place + b"\xc3(" + b"b" * 10_000)
    place += len(mark)
    with pytest.raises(ValueError, match=rf"bad.txt is not UTF-8 text \(byte {place}\)"):
        read_text(file, tokenizer, None)


def test_the_mark_before_a_text_is_not_text(tmp_path, tokenizer):
    """Windows editors write one: it would be scored, and learned, as a first word."""
    (tmp_path / "marked.txt").write_bytes("\ufeffIt was\r\n\ufeff so.".encode())
    (tmp_path / "plain.txt").write_bytes("It was\n\ufeff so.".encode())
    marked, plain = (read_text(tmp_path / f"{name}.txt", tokenizer, None) for name in ("marked", "plain"))
    assert marked.ids.equal(plain.ids) and marked.bytes == plain.bytes and marked.sha256 != plain.sha256


# ---- what is no regular file ---------------------------------------------------------------------------------
def fed(tmp_path, content):
    """A named pipe that gets this content once."""
    pipe = tmp_path / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)

    def feed():
        with open(pipe, "wb") as file:
            file.write(content)

    threading.Thread(target=feed, daemon=True).start()
    return pipe


def test_a_pipe_is_read_once_and_its_fingerprint_is_of_what_was_read(tmp_path, tokenizer):
    contents = [NOVEL[3000:9000].encode(), NOVEL[40_000:46_000].encode()]
    texts = []
    for content in contents:
        pipe = fed(tmp_path, content)
        check_readable(pipe)
        texts.append(read_text(pipe, tokenizer, None))
    file = tmp_path / "file.txt"
    for text, content in zip(texts, contents, strict=True):
        file.write_bytes(content)
        assert text.sha256 == hashlib.sha256(content).hexdigest()
        assert text.ids.tolist() == read_text(file, tokenizer, None).ids.tolist()
    assert texts[0].fingerprint != texts[1].fingerprint
    with pytest.raises(ValueError, match="can be read once only, but 2 processes"):
        check_readable(pipe, processes=2)


def test_an_endless_pipe_is_read_as_far_as_it_is_needed(tmp_path, tokenizer):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ended = threading.Event()

    def feed():
        with contextlib.suppress(BrokenPipeError), open(pipe, "wb", buffering=0) as file:
            while True:
                file.write(b"the cat sat\n" * 100)
        ended.set()

    threading.Thread(target=feed, daemon=True).start()
    assert len(read_text(pipe, tokenizer, 500).ids) == 500
    assert ended.wait(120)


# ---- several texts, the shipped books ------------------------------------------------------------------------
def test_texts_follow_one_another_each_cut(tmp_path, tokenizer):
    for name, part in (("a", NOVEL[3000:9000]), ("b", NOVEL[50_000:50_050])):
        (tmp_path / name).write_text(part)
    files = [tmp_path / "a", tmp_path / "b"]
    first, second = (tokenizer(file.read_text(), add_special_tokens=False)["input_ids"] for file in files)
    assert read_texts(files, tokenizer).tolist() == [*first, tokenizer.eos_token_id, *second]
    assert read_texts(files, tokenizer, 100).tolist() == [*first[:100], tokenizer.eos_token_id, *second[:100]]
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match="b holds no text"):
        read_texts(files, tokenizer)
    with pytest.raises(FileNotFoundError):
        read_texts([tmp_path / "c"], tokenizer)
    with pytest.raises(IsADirectoryError):
        check_readable(tmp_path)


def test_a_book_knows_its_chapters(tokenizer):
    book = read_book("Nostromo", "nostromo.txt", 20_000)
    assert book.name == "Nostromo" and len(book.ids) == 20_000 and len(book.chapters) >= 2
    for position in book.chapters:
        assert tokenizer.decode(book.ids[position : position + 8]).strip().startswith("CHAPTER")
