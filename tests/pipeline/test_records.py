"""Which columns of a record are read, which rows are skipped, and what is said of both."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import DataError
from secateur.pipeline.calibration import calibration_tokens, evaluation_windows, training_rows
from secateur.pipeline.records import from_records
from tiny import TEXT, tiny_config

USER, ANSWER = ({"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So.")))


def plain(corpus):
    """Texts, and the messages of chats."""
    return [text if isinstance(text, str) else text.messages for text in corpus.texts]


def refused(records, *said, **options):
    with pytest.raises(DataError) as caught:
        from_records(records, "rows", **options)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in said), line


# Rows without anything.

NOTHING = st.sampled_from(
    [{}, {"text": None}, {"text": float("nan")}, {"messages": None}, {"messages": []}, {"input_ids": []},
     {"input_ids": None, "text": None, "id": 7}, {"id": 7}, None]
)  # fmt: skip
SOMETHING = st.one_of(
    st.text(min_size=1).map(lambda text: {"text": text + "."}),
    st.just({"messages": None, "text": "beside a null"}),
    st.just({"messages": [], "input_ids": None, "text": "beside an empty list", "id": 7}),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(NOTHING, SOMETHING), min_size=1, max_size=8))
def test_rows_without_anything_are_skipped(records):
    texts = [record["text"] for record in records if record and isinstance(record.get("text"), str)]
    if not texts:
        refused(records, "rows")
        return
    assert from_records(records, "rows").texts == texts


def test_skipped_rows_are_counted(messages):
    from_records([{"text": None}, {"text": "a"}, {"messages": []}, {"id": 5}], "rows")
    assert "rows: 3 of 4 rows hold no text and are skipped" in messages
    messages.clear()
    from_records([{"text": "a"}, {"text": ""}, {"text": "b"}], "rows")
    assert messages == []  # an empty line of a text is a part of it: WikiText is full of them


@pytest.mark.parametrize(
    "records",
    [
        [{"text": None}] * 3,
        [{"text": ""}, {"text": " \n"}],
        [{"messages": []}],
        [{"input_ids": []}],
        [{"text": None}, None],
    ],
)
def test_rows_of_nothing_alone_are_refused(records):
    refused(records, f"rows: holds no text: its {len(records)} rows are empty")


# Columns.

FOUND = {
    "content": ([{"content": "a", "path": "x.py"}], ["a"], "reads content; leaves out path"),
    "one column of any name": ([{"sentence": "a"}], ["a"], "reads sentence"),
    "one column of ids": ([{"tokens": [3, 4]}], [[3, 4]], "reads tokens"),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}],
        [[USER, ANSWER]],
        "reads conversations",
    ),
    "a system message, a tool": (
        [{"conversations": [{"from": "system", "value": "s"}, {"from": "observation", "value": "o"}], "id": 1}],
        [[{"role": "system", "content": "s"}, {"role": "tool", "content": "o"}]],
        "reads conversations; leaves out id",
    ),
    "roles under conversations": ([{"conversations": [USER, ANSWER]}], [[USER, ANSWER]], "reads conversations"),
    "ShareGPT under messages": ([{"messages": [{"from": "human", "value": "Why?"}]}], [[USER]], None),
    "a completion continues": ([{"prompt": "a ", "completion": "b"}], ["a b"], "reads prompt, completion"),
    "a response answers": ([{"prompt": "Why?", "response": "So."}], [[USER, ANSWER]], "reads prompt, response"),
    "a question": ([{"question": "Why?", "answer": "So."}], [[USER, ANSWER]], "reads question, answer"),
    "Alpaca": (
        [{"instruction": "Add.", "input": "1 1", "output": "2"}],
        [[{"role": "user", "content": "Add.\n1 1"}, {"role": "assistant", "content": "2"}]],
        "reads instruction, input, output",
    ),
    "Alpaca without input": ([{"instruction": "Why?", "input": "", "output": "So."}], [[USER, ANSWER]], "instruction"),
    "messages as prompt and completion": ([{"prompt": [USER], "completion": [ANSWER]}], [[USER, ANSWER]], "prompt"),
    "columns of a chat's messages": (
        [{"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}}],
        [[USER, ANSWER]],
        None,
    ),
    "text before others": ([{"text": "a", "content": "b"}], ["a"], "reads text; leaves out content"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_column_with_one_obvious_meaning_is_read_and_said(kind, messages):
    records, expected, said = FOUND[kind]
    corpus = from_records(records * 2, "rows")
    assert (corpus.rows or plain(corpus)) == expected * 2
    assert len(messages) == (said is not None) and all(said in line for line in messages)


@pytest.mark.parametrize(
    "record",
    [
        {"title": "a", "body": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"content": "a", "conversations": [USER]},
        {"prompt": "a", "question": "b", "answer": "c"},
        {"content": 5, "path": "x"},
        {"prompt": 5, "response": "a"},
    ],
)
def test_columns_without_one_obvious_meaning_are_named(record):
    refused([record], "rows: row 1 has none of the fields text, messages, input_ids; it has " + ", ".join(record))
    refused([record], "choose it so", choose="choose it so")


def test_a_list_of_messages_is_one_chat_and_no_rows():
    refused([USER, ANSWER], "row 1 is one message of a chat", "messages")


@pytest.mark.parametrize("labels", [False, True])
def test_columns_beside_token_ids_are_told_in_one_line(labels, messages):
    row = {"input_ids": [3, 4], "attention_mask": [1, 1], "labels": [3, 4], "position_ids": [0, 1]}
    corpus = from_records([row] * 3, "rows", labels=labels)
    left = "position_ids" if labels else "labels, position_ids"
    assert messages == [f"rows: reads input_ids; leaves out {left}"] and corpus.rows == [[3, 4]] * 3


def test_evaluation_says_that_labels_are_left_out(tmp_path, messages):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [3, 4], "labels": [-100, 4]}))
    found = evaluation_windows(tmp_path / "rows.jsonl", None, tiny_config("llama"), None, None)
    assert found.labels is None and messages == ["rows.jsonl: reads input_ids; leaves out labels"]


def test_names_of_columns_are_shown_in_one_line(messages):
    corpus = from_records([{"text": "a", "b\nc": 1, "\ud800": 2}], "rows")
    assert corpus.texts == ["a"] and messages == ["rows: reads text; leaves out b\\nc, \\ud800"]


def test_no_more_of_a_stream_is_read_than_decides():
    read = []
    stream = ({"title": str(read.append(1)), "body": "b"} for _ in range(10**6))
    refused(stream, "none of the fields", characters=100)
    assert len(read) == 2048


# Labels.

ROW = [5, 6, 7, 8]
LEARNT = {
    "labels": ({"labels": [-100, -100, 7, 8]}, [-100, -100, 7, 8]),
    "completion_mask": ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 7, 8]),
    "assistant_masks": ({"assistant_masks": [0, 1, 0, 1]}, [-100, 6, -100, 8]),
    "both masks": ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, [-100, 6, -100, 8]),
    "labels and a mask": ({"labels": [-100, 6, 7, 8], "completion_mask": [1, 1, 1, 0]}, [-100, 6, 7, -100]),
    "nothing": ({}, None),
    "null": ({"labels": None}, None),
}


@pytest.mark.parametrize("kind", LEARNT)
def test_what_is_learnt(kind):
    beside, expected = LEARNT[kind]
    corpus = from_records([{"input_ids": ROW, **beside}], "rows", labels=True)
    assert corpus.rows == [ROW] and corpus.labels == (expected and [expected])


def test_padding_is_left_out_of_labels_too():
    batch = {"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}
    corpus = from_records([{**batch, "labels": [[-100, 5, 6], [-100, 8, 9]]}], "rows", labels=True)
    assert corpus.rows == [[5, 6], [7, 8, 9]] and corpus.labels == [[5, 6], [-100, 8, 9]]


def test_rows_without_labels_beside_rows_with_them_are_learnt_whole():
    corpus = from_records([{"input_ids": [3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}], "rows", labels=True)
    assert corpus.labels == [[3, 4], [-100, 6]]


@pytest.mark.parametrize("name", ["attention_mask", "labels", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("value", [[1], [1] * 5, [[1] * 4] * 2, 5, "1111", [[1, 1], [1, 1]]])
def test_columns_of_another_length_are_named(name, value):
    said = (f"rows: row 2: {name} must have a value for each of its 4 token ids",)
    refused([{"input_ids": ROW}, {"input_ids": ROW, name: value}], *said, labels=True)


def test_labels_that_are_none_are_named():
    refused([{"input_ids": [3, 4], "labels": [0.5, 4]}], "row 1: labels are no whole numbers", labels=True)
    for wrong in (-1, 128, 10**6):
        with pytest.raises(DataError, match=r"row 1 has a label that is neither -100 nor a token id .* of 128"):
            training_rows([{"input_ids": [3, 4], "labels": [3, wrong]}], None, tiny_config("llama"), None, 5)


def test_rows_in_which_nothing_is_learnt_are_skipped_and_counted(messages):
    records = [
        {"input_ids": [3, 4, 5], "labels": [-100] * 3},
        {"input_ids": [3, 4, 5], "labels": [3, -100, -100]},  # nothing predicts the first
        {"input_ids": [6, 7, 8], "labels": [-100, -100, 8]},
        {"input_ids": [9]},
    ]
    found = training_rows(records, None, tiny_config("llama"), None, 9)
    assert [row.tolist() for row in found.rows] == [[6, 7, 8]]
    assert [row.tolist() for row in found.labels] == [[-100, -100, 8]]
    assert "the given records: 3 of 4 rows hold no token to predict and are skipped" in messages
    with pytest.raises(DataError, match="no rows of at least 2 tokens"):
        training_rows(records[:2], None, tiny_config("llama"), None, 9)


def digest_of(rows):
    """As it was before there were labels."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(len(row).to_bytes(8, "little") + b"".join(token.to_bytes(8, "little") for token in row))
    return sha.hexdigest()


def test_labels_are_part_of_a_digest_only_where_they_are():
    def read(**beside):
        return training_rows([{"input_ids": ROW, **beside}] * 2, None, tiny_config("llama"), None, 9)

    without, some, fewer = read(), read(labels=[-100, 6, 7, 8]), read(labels=[-100, -100, 7, 8])
    assert without.labels is None and without.digest == digest_of([ROW] * 2)
    assert len({without.digest, some.digest, fewer.digest}) == 3
    calibration = calibration_tokens([{"input_ids": ROW, "labels": ROW}] * 2, None, tiny_config("llama"), None, None, 0)
    assert calibration.digest == without.digest


def test_texts_and_token_ids_in_one_file_are_refused():
    refused([{"text": TEXT}, {"input_ids": [3]}], "some rows are tokenised and some are not")
