"""How much of a text is tokenised, and how several sources share the tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_data import byte_tokenizer, ids

from d2dmoe.config import DataConfig, UserError
from d2dmoe.data import make_batches, read_documents
from d2dmoe.data.reading import read_batches, sources_of

CONFIG = DataConfig(max_length=16, batch_size=4)
TOKENIZER = byte_tokenizer()


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self):
        self.characters, self.eos_token_id, self.pad_token_id = 0, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
        self.is_fast, self.encode = True, TOKENIZER.encode

    def __call__(self, text, **options):
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return TOKENIZER(text, **options)


def write(path: Path, letter: str, lines: int) -> str:
    path.write_text("".join(f"{letter * 3}{n:05d}\n" for n in range(lines)))
    return str(path)


def read(data: str, *, tokens: int = 0, seed: int | None = None, packed: bool = True, tokenizer=TOKENIZER, **changes):
    config = DataConfig(**{"max_length": 16, "batch_size": 4, **changes}, data=data)
    return read_batches(config, "all", tokenizer, packed=packed, tokens=tokens, seed=seed)


def rows(batches) -> list[list[int]]:
    return [item["input_ids"] for item in batches.items]


def whole(data: str, packed: bool = True) -> list[list[int]]:
    return rows(make_batches(read_documents(data), TOKENIZER, CONFIG, packed=packed))


@pytest.mark.parametrize("packed", [True, False])
def test_the_beginning_is_as_of_the_whole_and_the_rest_is_not_tokenised(tmp_path, packed):
    source, tokenizer = write(tmp_path / "a.txt", "a", 3000), Counting()
    batches = read(source, tokens=100, packed=packed, tokenizer=tokenizer)
    assert rows(batches.first(100)) == whole(source, packed)[: len(batches.first(100).items)]
    assert tokenizer.characters < 3000 if packed else tokenizer.characters == 3000 * 9 - 1  # one document stays whole


def test_a_text_that_is_not_much_longer_is_read_as_a_whole(tmp_path):
    source = write(tmp_path / "a.txt", "a", 100)
    assert rows(read(source, tokens=200, seed=0)) == whole(source)
    assert rows(read(source, tokens=0, seed=0)) == whole(source)


@pytest.mark.parametrize("documents", [False, True])
def test_a_sample_is_from_all_over_the_text_and_of_nothing_else(tmp_path, documents):
    source, tokenizer = write(tmp_path / "a.txt", "a", 20_000), Counting()
    if documents:  # of one line each
        Path(source).write_text(Path(source).read_text().replace("\n", "<|endoftext|>"))
    batches = read(source, tokens=2000, seed=3, tokenizer=tokenizer)
    assert batches.tokens >= 2000
    assert tokenizer.characters < 30_000
    text = TOKENIZER.decode([i for row in rows(batches) for i in row])
    numbers = [int(part[:5]) for part in text.split("aaa") if part[:5].isdigit() and len(part) >= 5]
    assert len(numbers) > 100
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(number // 2000 for number in numbers)
    assert len(tenths) == 10
    assert rows(read(source, tokens=2000, seed=3)) == rows(batches)
    assert rows(read(source, tokens=2000, seed=4)) != rows(batches)


def test_a_tokenizer_with_long_tokens_gets_more_text(tmp_path):
    """20 characters a token: the first portion is too little."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"{n:020d}" for n in range(1000)]
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*words, "?"])}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("\n".join(words * 10))
    batches = read(
        str(tmp_path / "a.txt"), tokens=500, seed=0, tokenizer=PreTrainedTokenizerFast(tokenizer_object=model)
    )
    assert 500 <= batches.tokens < 10_000


def test_labelled_rows_are_all_read(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"row number {n},{n % 2}\n" for n in range(500)))
    assert len(read(str(tmp_path / "a.csv"), tokens=10, seed=0, packed=False).items) == 500


# --- several sources -------------------------------------------------------------------------------------------------


def shares(batches) -> Counter:
    """Tokens of each letter."""
    return Counter(letter for row in rows(batches) for letter in "abc" if ids(letter)[0] in row)


def test_sources_share_the_tokens_whatever_their_sizes_and_alternate(tmp_path):
    data = f"{write(tmp_path / 'a.txt', 'a', 20_000)},{write(tmp_path / 'b.txt', 'b', 2000)}"
    for seed in (None, 0):
        batches = read(data, tokens=1600, seed=seed)
        assert batches.tokens == pytest.approx(1600, abs=32)
        for part in (batches, batches.first(160), *([] if seed is None else [batches.shuffled(1).first(800)])):
            found = shares(part)
            assert found["a"] == pytest.approx(found["b"], abs=0.35 * len(part.items))
        assert shares(batches)["a"] == shares(batches)["b"]


def test_a_small_source_gives_all_and_the_others_the_rest(tmp_path):
    paths = [
        write(tmp_path / f"{letter}.txt", letter, lines) for letter, lines in (("a", 5000), ("b", 20), ("c", 5000))
    ]
    batches = read(",".join(paths), tokens=1600, seed=0)
    assert batches.tokens == pytest.approx(1600, abs=48)
    assert shares(batches)["b"] == len(whole(paths[1]))
    assert shares(batches)["a"] == pytest.approx(shares(batches)["c"], abs=1)


def test_everything_of_all_sources(tmp_path):
    paths = [write(tmp_path / "a.txt", "a", 300), write(tmp_path / "b.txt", "b", 100)]
    assert sorted(rows(read(", ".join(paths)))) == sorted(whole(paths[0]) + whole(paths[1]))


def test_each_source_is_divided_by_itself(tmp_path):
    data = f"{write(tmp_path / 'a.txt', 'a', 300)},{write(tmp_path / 'b.txt', 'b', 300)}"
    held_out = read_batches(DataConfig(data=data, max_length=16), "held_out", TOKENIZER, packed=True, tokens=64)
    assert shares(held_out)["a"] == shares(held_out)["b"] > 0


def test_a_comma_in_a_name_and_no_comma(tmp_path):
    path = write(tmp_path / "a,b.txt", "a", 30)
    assert sources_of(path) == [path]
    assert sources_of("builtin") == ["builtin"]
    assert sources_of("x/y.txt, z") == ["x/y.txt", "z"]
    assert rows(read(path)) == whole(path)


def test_sources_of_different_kinds_are_refused(tmp_path):
    (tmp_path / "l.csv").write_text("text,label\n" + "".join(f"row number {n},{n % 2}\n" for n in range(50)))
    data = f"{write(tmp_path / 'a.txt', 'a', 300)},{tmp_path / 'l.csv'}"
    with pytest.raises(UserError, match=r"l\.csv gives input_ids and label, and .*a\.txt input_ids; mix data of one"):
        read(data, packed=False)
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read(f"{tmp_path / 'a.txt'},{tmp_path / 'nowhere.txt'}")
