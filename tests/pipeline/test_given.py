"""Calibration and training data as other scripts hand it over: every kind gives exactly its token ids."""

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from secateur.errors import DataError
from secateur.pipeline.calibration import calibration_tokens, training_rows
from tiny import TEXT, tiny_config

IDS = torch.arange(3, 35).reshape(4, 8)
MASK = torch.ones(4, 8, dtype=torch.long)
MASK[1, :3] = 0  # padded on the left
MASK[2, 5:] = 0  # and on the right
ROWS = IDS.tolist()
REAL = [ROWS[0], ROWS[1][3:], ROWS[2][:5], ROWS[3]]
TAR = torch.full_like(IDS, -100)
TAR[:, -1] = IDS[:, -1]  # targets as the loaders of Wanda and SparseGPT make them


class MapStyle(Dataset):
    """A data set with a length and items, and no iterator."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Frame:
    """What is used of a frame of polars."""

    __module__ = "polars.dataframe.frame"

    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter("columns")

    def to_dicts(self):
        return self.records


def batches(**columns):
    return DataLoader([{name: c[i] for name, c in columns.items()} for i in range(4)], batch_size=2)


KINDS = {
    "pairs of Wanda": (lambda: [(x[None], y[None]) for x, y in zip(IDS, TAR, strict=True)], ROWS),
    "pairs [T]": (lambda: [(x, x.clone()) for x in IDS], ROWS),
    "pairs of shifted targets": (lambda: [(x, x.roll(-1)) for x in IDS], ROWS),
    "pairs with a mask": (lambda: list(zip(IDS, MASK, strict=True)), REAL),
    "a loader of dicts": (lambda: batches(input_ids=IDS), ROWS),
    "a loader of dicts with masks": (lambda: batches(input_ids=IDS, attention_mask=MASK), REAL),
    "a loader of tensors": (lambda: DataLoader(IDS, batch_size=2), ROWS),
    "a loader of a TensorDataset": (lambda: DataLoader(TensorDataset(IDS), batch_size=3), ROWS),
    "a TensorDataset with a mask": (lambda: TensorDataset(IDS, MASK), REAL),
    "a TensorDataset of ids, mask, labels": (lambda: TensorDataset(IDS, MASK, IDS.where(MASK == 1, -100)), REAL),
    "a TensorDataset of ids and classes": (lambda: TensorDataset(IDS, torch.arange(4)), ROWS),
    "an array": (lambda: IDS.numpy(), ROWS),
    "an array of 32 bits": (lambda: IDS.numpy().astype(np.int32), ROWS),
    "an array of unsigned 16 bits": (lambda: IDS.numpy().astype(np.uint16), ROWS),
    "an array of lists": (lambda: np.array([*ROWS[:3], [7, 8]], dtype=object), [*ROWS[:3], [7, 8]]),
    "a list of arrays": (lambda: [IDS[0].numpy(), IDS[1][None].numpy()], ROWS[:2]),
    "a list of tensors [B, T]": (lambda: [IDS[:2], IDS[2:]], ROWS),
    "a list of lists": (lambda: ROWS, ROWS),
    "a tuple of tuples": (lambda: tuple(map(tuple, ROWS)), ROWS),
    "a list of lists [1, T]": (lambda: [[row] for row in ROWS], ROWS),
    "a generator of lists": (lambda: iter(ROWS), ROWS),
    "a generator of records": (lambda: ({"input_ids": row} for row in ROWS), ROWS),
    "a dict of tensors": (lambda: {"input_ids": IDS, "attention_mask": MASK}, REAL),
    "records [1, T] with masks": (
        lambda: [{"input_ids": x[None], "attention_mask": m[None]} for x, m in zip(IDS, MASK, strict=True)],
        REAL,
    ),
    "records of arrays": (lambda: [{"input_ids": x.numpy()} for x in IDS], ROWS),
    "a data set of items": (lambda: MapStyle([{"input_ids": x} for x in IDS]), ROWS),
    "a data set of tensors": (lambda: MapStyle(list(IDS)), ROWS),
    "datasets": (lambda: datasets.Dataset.from_dict({"input_ids": ROWS, "attention_mask": MASK.tolist()}), REAL),
    "datasets as torch": (lambda: datasets.Dataset.from_dict({"input_ids": ROWS}).with_format("torch"), ROWS),
    "datasets as numpy": (lambda: datasets.Dataset.from_dict({"input_ids": ROWS}).with_format("numpy"), ROWS),
    "datasets, a stream": (lambda: datasets.Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset(), ROWS),
    "a column of datasets": (lambda: datasets.Dataset.from_dict({"input_ids": ROWS})["input_ids"], ROWS),
    "a frame of pandas": (lambda: pandas.DataFrame({"input_ids": ROWS, "attention_mask": MASK.tolist()}), REAL),
    "a column of pandas": (lambda: pandas.Series(ROWS), ROWS),
    "a frame of polars": (lambda: Frame([{"input_ids": row} for row in ROWS]), ROWS),
    "a table of arrow": (lambda: pyarrow.table({"input_ids": ROWS}), ROWS),
}


def read(way, given):
    """Tokens for what is given as calibration, or as data to train on."""
    config = tiny_config("llama")
    if way == "calibration":
        return calibration_tokens(given, None, config, None, None, 0)
    return training_rows(given, None, config, None, 50)


@pytest.mark.parametrize("way", ["calibration", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_ids(kind, way):
    make, expected = KINDS[kind]
    tokens = read(way, make())
    assert [row.tolist() for row in tokens.rows] == expected
    assert all(row.dtype == torch.long for row in tokens.rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("group", [1, 2])
def test_a_list_of_what_a_tokenizer_gives(tokenizer, side, group):
    texts = ["A good cut.", "In spring the branches are short", "bud", TEXT[:90]]
    parts = [texts[i : i + group] for i in range(0, 4, group)]
    given = [tokenizer(part, return_tensors="pt", padding=True, padding_side=side) for part in parts]
    found = calibration_tokens(given, None, tiny_config("llama"), None, None, 0)
    assert [row.tolist() for row in found.rows] == tokenizer(texts)["input_ids"]


def test_targets_of_pairs_are_labels_in_training(messages):
    """Where they are the inputs or -100; shifted ones are left out, which is told."""
    config = tiny_config("llama")
    given = [(x[None], y[None]) for x, y in zip(IDS, TAR, strict=True)]
    assert [row.tolist() for row in training_rows(given, None, config, None, 50).labels] == TAR.tolist()
    assert training_rows([(x, x.roll(-1)) for x in IDS], None, config, None, 50).labels is None
    assert messages == ["the given records: reads input_ids; leaves out targets"]
    messages.clear()
    calibration_tokens(given, None, config, None, None, 0)
    assert "the given records: reads input_ids; leaves out labels" in messages


STRINGS = ["A good cut.", "In spring the branches are short"]
TEXTS = {
    "a series": lambda: pandas.Series([STRINGS[0], None, STRINGS[1]]),
    "a list with nulls": lambda: [STRINGS[0], None, float("nan"), STRINGS[1]],
    "an array": lambda: np.array(STRINGS),
    "an array of objects": lambda: np.array([*STRINGS, None], dtype=object),
    "a column of datasets": lambda: datasets.Dataset.from_dict({"text": STRINGS})["text"],
    "a column of arrow": lambda: pyarrow.chunked_array([STRINGS]),
    "a data set of items": lambda: MapStyle(STRINGS),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_strings(tokenizer, kind, messages):
    found = calibration_tokens(TEXTS[kind](), tokenizer, tiny_config("llama"), None, None, 0)
    assert [row.tolist() for row in found.rows] == tokenizer(STRINGS)["input_ids"]
    assert any("are null and are skipped" in line for line in messages) == (len(TEXTS[kind]()) > 2)


@pytest.mark.parametrize("make", [pandas.DataFrame, Frame, lambda records: pyarrow.Table.from_pylist(records)])
def test_a_table_of_texts(tokenizer, make, messages):
    """And not the names of its columns, over which a frame iterates."""
    records = [{"text": text, "id": n} for n, text in enumerate([TEXT, None, TEXT])]
    found = calibration_tokens(make(records), tokenizer, tiny_config("llama"), None, 16, 0)
    expected = calibration_tokens([{"text": TEXT}] * 2, tokenizer, tiny_config("llama"), None, 16, 0)
    assert found.digest == expected.digest
    assert "the given records: 1 of 3 rows hold no text and are skipped" in messages
    assert "the given records: reads text; leaves out id" in messages


def test_chats_as_lists(tokenizer):
    chat = [{"role": "user", "content": TEXT}]
    one, other = (
        calibration_tokens(g, tokenizer, tiny_config("llama"), 2, 16, 0) for g in ([chat], [{"messages": chat}])
    )
    assert one.digest == other.digest


def test_an_iterable_without_an_end():
    def endless():
        while True:
            yield {"input_ids": ROWS[0]}

    assert len(calibration_tokens(endless(), None, tiny_config("llama"), None, None, 0).rows) == 128
    assert len(calibration_tokens(endless(), None, tiny_config("llama"), 3000, None, 0).rows) == 3000


WRONG = {
    "one dimension": (IDS[0], "must be integer ids [samples, seqlen], not int64 [8]"),
    "an array of one dimension": (IDS[0].numpy(), "not int64 [8]"),
    "three dimensions": (IDS[:, None], "not int64 [4, 1, 8]"),
    "fractions": (IDS.numpy() / 2, "not float64 [4, 8]"),
    "a tensor of fractions": (
        [IDS[0] / 2],
        "item 1: must be integer ids [tokens] or [rows, tokens], and is float32 [8]",
    ),
    "a tensor without dimensions": ([torch.tensor(5)], "item 1: must be integer ids"),
    "pairs of fractions": ([(IDS[0] / 2, IDS[0])], "item 1: must be integer ids"),
    "two masks": ([(IDS[0], MASK[0], MASK[0])], "two of them attention_mask"),
    "lists of fractions": ([[1.5, 2.5]], "row 1: input_ids is no list of whole numbers"),
    "numbers": (pandas.Series([1.0, 2.0]), "row 1 is a value of type float"),
    "splits": (
        datasets.DatasetDict(
            {"train": datasets.Dataset.from_dict({"text": ["a"]}), "test": datasets.Dataset.from_dict({})}
        ),
        "has the splits train, test; give one of them, such as data['train']",
    ),
    "a dict of columns": ({"text": ["a", "b"]}, "cannot use a dict of text; give a list of records"),
    "bytes": (b"abc", "cannot use a value of type bytes"),
    "a list of bytes": ([b"abc"], "row 1"),
    "an object": (object(), "cannot use a value of type object"),
    "nulls alone": ([None, None], "is empty"),
    "a mask of another length": (
        {"input_ids": IDS, "attention_mask": MASK[:, :5]},
        "attention_mask must have a value for each",
    ),
    "embeddings": ({"inputs_embeds": IDS / 2}, "cannot use a dict of inputs_embeds"),
}


@pytest.mark.parametrize("way", ["calibration", "data"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_used_is_named_by_what_it_is(kind, way):
    given, said = WRONG[kind]
    with pytest.raises(DataError) as caught:
        read(way, given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
