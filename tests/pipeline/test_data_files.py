"""Files of data as users have them: marks, encodings, packing, endings, columns, pointers."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import DataError
from secateur.pipeline.calibration import calibration_tokens, evaluation_windows, training_rows
from secateur.pipeline.data_files import read_text
from secateur.pipeline.rules import allocation_rules
from secateur.pipeline.sources import read_source
from tiny import TEXT, tiny_config

WORDS = "Zürich, in spring"
RECORDS = [{"text": WORDS}, {"text": "second"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content, encoding="utf-8"):
    Path(name).write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return str(name)


def refused(source, *said):
    with pytest.raises(DataError) as caught:
        read_source(source, "train")
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in said), line


def parquet(name, records):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), name)
    return name


# Encodings.


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_a_byte_order_mark_is_no_text(place, name):
    assert read_source(write(name, WORDS, "utf-8-sig"), "train").texts == [WORDS]
    assert read_source(write(name, "\ufeff" + WORDS, "utf-8-sig"), "train").texts == ["\ufeff" + WORDS]  # one is a mark


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.json", json.dumps(RECORDS)), ("a.json", LINES)])
def test_a_byte_order_mark_before_json(place, name, content):
    assert read_source(write(name, content, "utf-8-sig"), "train").texts == [WORDS, "second"]


def test_a_byte_order_mark_before_raw_wikitext(place):
    assert read_source(write("a.raw", " \n a \n", "utf-8-sig"), "test").texts == ["", " a \n"]


def test_a_byte_order_mark_before_an_allocation(place):
    assert allocation_rules(write("a.yaml", "layers.0: 0.25\n", "utf-8-sig")) == {"layers.0": "0.25"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "content"), [("a.txt", TEXT), ("a.jsonl", LINES)])
def test_another_encoding_is_named_and_how_to_convert(place, encoding, name, content):
    seems = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    command = f"iconv -f {seems} -t UTF-8 {name}"
    refused(write(name, content, encoding), name, f"not UTF-8 text but seems to be {seems}", command)


def test_the_command_that_is_told_converts(place):
    write("a.txt", TEXT, "utf-16")
    with pytest.raises(DataError) as caught:
        read_text(Path("a.txt"))
    command = str(caught.value).partition("convert it: ")[2]
    Path("b.txt").write_bytes(subprocess.run(command.split(), capture_output=True, check=True).stdout)
    assert read_text(Path("b.txt")) == TEXT


def test_eight_bits_are_no_utf_8(place):
    refused(write("a.txt", WORDS, "latin-1"), "a.txt: is not UTF-8 text; convert it: iconv -f ENCODING -t UTF-8 a.txt")


def test_a_zero_byte_is_no_encoding(place):
    assert read_text(Path(write("a.txt", WORDS + "\0" + WORDS))) == WORDS + "\0" + WORDS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_every_way(place, end):
    assert read_source(write("a.txt", f"a{end}b"), "train").texts == ["a\nb"]
    assert len(read_source(write("a.jsonl", LINES.replace("\n", end)), "train").texts) == 2


# Pointers and packing.


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.jsonl", "a.json", "a.parquet", "a.PARQUET", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs(place, name):
    refused(write(name, POINTER), f"{name}: a pointer of Git LFS in place of the file; fetch it with: git lfs pull")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "A.JSONL.GZ"])
def test_gzip_is_unpacked(place, name):
    assert read_source(write(name, gzip.compress(LINES.encode())), "train").texts == [WORDS, "second"]


def test_a_text_in_gzip(place):
    assert read_source(write("a.txt.gz", gzip.compress(b"\xef\xbb\xbfa\r\nb")), "train").texts == ["a\nb"]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:30], lambda b: b[:20] + b"\xff" * 9 + b[29:]])
def test_a_damaged_gzip_is_named(place, damage):
    refused(write("a.txt.gz", damage(gzip.compress(TEXT.encode()))), "a.txt.gz: is not a sound gzip file")


@pytest.mark.parametrize(
    ("name", "magic", "command"),
    [
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd -d a.jsonl.zst"),
        ("a.txt.bz2", b"BZh91AY", "bunzip2 a.txt.bz2"),
        ("a.txt.xz", b"\xfd7zXZ\0", "unxz a.txt.xz"),
        ("a.txt", b"PK\x03\x04", "unzip a.txt"),
    ],
)
def test_other_packing_is_named(place, name, magic, command):
    refused(write(name, magic + b"..."), name, "is compressed", command)


# Endings.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", LINES),
        ("a.Json", LINES),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.jsonl", json.dumps(RECORDS, indent=2)),  # an array under the ending of lines
        ("a.json", json.dumps({"version": "1", "data": RECORDS, "tags": ["x"]})),
        ("a.json", json.dumps([record["text"] for record in RECORDS])),
    ],
)
def test_records_of_json(place, name, content):
    assert read_source(write(name, content), "train").texts == [WORDS, "second"]


def test_a_json_file_of_one_record(place):
    assert read_source(write("a.json", json.dumps(RECORDS[0])), "train").texts == [WORDS]
    chat = [{"role": "user", "content": "a"}]
    assert read_source(write("a.json", json.dumps({"messages": chat})), "train").texts[0].messages == chat


def test_token_ids_as_lists_of_json(place):
    for content in ("[[3, 4], [5]]", "[3, 4]\n[5]\n"):
        assert read_source(write("a.json", content), "train").rows == [[3, 4], [5]]


def test_several_lists_of_records_are_named(place):
    content = json.dumps({"train": RECORDS, "test": RECORDS})
    refused(write("a.json", content), "a.json: holds several lists (train, test)")


def test_parquet_in_capitals(place):
    assert read_source(parquet("A.PARQUET", RECORDS), "train").texts == [WORDS, "second"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ""), ("a.tsv", ", sep='\\t'")])
def test_a_table_is_named_with_the_way_out(place, name, separator):
    refused(
        write(name, "text\na\n"),
        f"{name}: is a table; make JSON lines of it: pandas.read_csv({name!r}{separator}).to_json('a.jsonl'",
    )


def test_the_way_out_of_a_table_is_one(place):
    import pandas

    write("a.csv", 'text,id\n"one, two",1\nthree,2\n')
    pandas.read_csv("a.csv").to_json("a.jsonl", orient="records", lines=True)
    assert read_source("a.jsonl", "train").texts == ["one, two", "three"]


# Columns.

COLUMNS = [{"title": "t", "body": WORDS, "ids": [3, 4], "chat": [{"role": "user", "content": "a"}]}] * 2


@pytest.mark.parametrize("form", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_a_column_of_a_file(place, form):
    lines = "\n".join(map(json.dumps, COLUMNS))
    if form == "a.parquet":
        parquet(form, COLUMNS)
    else:
        write(form, gzip.compress(lines.encode()) if form.endswith("gz") else lines)
    body = read_source(f"{form}:body", "train")
    assert (body.texts, body.rows, body.name) == ([WORDS] * 2, None, f"{form}:body")
    assert read_source(f"{form}:ids", "train").rows == [[3, 4]] * 2
    assert [c.messages for c in read_source(f"{form}:chat", "train").texts] == [COLUMNS[0]["chat"]] * 2


def test_a_column_comes_before_the_fields_that_are_usual(place):
    write("a.jsonl", json.dumps({"text": "a", "body": "b", "input_ids": [3]}))
    assert read_source("a.jsonl:body", "train").texts == ["b"]
    assert read_source("a.jsonl:text", "train").texts == ["a"]
    assert read_source("a.jsonl", "train").rows == [[3]]


def test_a_colon_in_the_name_of_a_file(place):
    write("C:\\data.txt", WORDS)
    assert read_source("C:\\data.txt", "train").texts == [WORDS]
    write("a:b.jsonl", json.dumps({"x:y": "one", "z": "two"}))
    assert read_source("a:b.jsonl:z", "train").texts == ["two"]
    assert read_source("a:b.jsonl:x:y", "train").texts == ["one"]
    write("a.jsonl", json.dumps({"z": "short"}))
    write("a.jsonl:z", "the file of this very name")
    refused("a.jsonl:z", "unknown kind of file")


def test_a_column_that_is_not_there(place):
    write("a.jsonl", json.dumps({"title": "a", "body": "b"}))
    refused("a.jsonl:boby", "row 1 has no column 'boby'; did you mean body?")
    refused("a.jsonl:", "row 1 has no column ''", "known: title, body")
    refused(write("a.txt", "words") + ":text", "a.txt: is a text, which has no column 'text'")


def test_columns_on_every_way(place, tokenizer):
    config = tiny_config("llama")
    write("a.jsonl", "\n".join([json.dumps({"title": "t", "body": TEXT})] * 3))
    write("b.txt", "\n\n".join([TEXT] * 3))
    for source in ("a.jsonl:body", Path("a.jsonl:body")):
        for read in (
            lambda s: calibration_tokens(s, tokenizer, config, 4, 16, 0),
            lambda s: evaluation_windows(s, tokenizer, config, 16, None),
            lambda s: training_rows(s, tokenizer, config, 16, 50),
        ):
            assert read(source).digest == read("b.txt").digest == read(Path("b.txt")).digest


# Parquet.


def test_parquet_of_chats_and_texts(place):
    """Each row has a null in one of the columns."""
    chat = [{"role": "user", "content": "a"}]
    found = read_source(parquet("a.parquet", [{"text": None, "messages": chat}, {"text": "b"}]), "train").texts
    assert found[0].messages == chat and found[1] == "b"


def test_parquet_writes_nothing_and_needs_no_home(place):
    """The cache of data sets lies in the user's home, which may be anybody's or nobody's."""
    parquet("a.parquet", [{"text": TEXT}] * 2)
    code = "from secateur.pipeline.sources import read_source; print(len(read_source('a.parquet', 'train').texts))"
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"HOME": "/proc/none"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert [path.name for path in place.iterdir()] == ["a.parquet"]


def test_parquet_without_pyarrow(place, monkeypatch):
    parquet("a.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("a.parquet", "a.parquet: needs the datasets library: pip install datasets; offline sources: ")
