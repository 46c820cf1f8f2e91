"""The first tokens of a text, without tokenizing the rest of it."""

from .text_file import TextFile

MARGIN = 64  # tokens after the last one that is wanted
_CHARACTERS, _PER_TOKEN = 4096, 8  # of the first prefix that is tried: at least, and for each token wanted

Offsets = list[tuple[int, int]]


def encode_beginning(tokenizer, file: TextFile, count: int | None) -> tuple[list[int], Offsets | None]:
    """The first `count` token ids of a text (None: all), and where each begins and ends in `file.text`.

    The ids are those that the whole text's tokenization begins with. A tokenizer's choice at one place depends on the
    characters that follow only as far as its rules look ahead: the rest of a word and a character after it where texts
    are split into words first, a few tokens where they are not. So a prefix is tokenized, twice as long each time, until
    it has MARGIN tokens more than wanted and one half as long began with the same tokens. Rules that reach further
    ahead than both prefixes would go unnoticed; a vocabulary made for that could have them, none in use does.

    The offsets are None for a tokenizer that has none.
    """
    if count is None:
        file.read_to(None)
        return _encode(tokenizer, file.text)
    size, shorter = max(_CHARACTERS, _PER_TOKEN * count), None
    while True:
        file.read_to(size)
        ids, offsets = _encode(tokenizer, file.text)
        if file.ended or (len(ids) >= count + MARGIN and ids[:count] == shorter):
            return ids[:count], offsets and offsets[:count]
        shorter = ids[:count] if len(ids) >= count + MARGIN else None
        size *= 2


def _encode(tokenizer, text: str) -> tuple[list[int], Offsets | None]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    return encoded["input_ids"], encoded["offset_mapping"] if tokenizer.is_fast else None
