"""Whatever a file or a record holds: rows of valid token ids, or an error of ours in one line."""

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.errors import DataError, OptionError
from secateur.pipeline.calibration import calibration_tokens, evaluation_windows
from secateur.pipeline.chats import as_chat
from secateur.pipeline.records import absent, from_records
from secateur.pipeline.sources import read_source
from tiny import TEXT, tiny_config

CONTEXT, VOCABULARY = 64, 128
every = settings(max_examples=150, deadline=None, derandomize=True)

SAMPLES = st.one_of(st.none(), st.integers(1, 6))
SEQLENS = st.one_of(st.none(), st.integers(2, 12))
SEEDS = st.integers(0, 2**32)
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs too
PROSE = st.lists(st.one_of(st.sampled_from([TEXT, TEXT[:40], "\n\n", " \n", ""]), st.text()), max_size=6).map("".join)
TEXTS = st.one_of(ANY_TEXT, PROSE)


@pytest.fixture(scope="module")
def config():
    return tiny_config("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


def usable(call):
    """What a call returns, or None where it refuses as it may: in one line that can be printed."""
    try:
        return call()
    except (DataError, OptionError) as error:
        said = str(error)
    assert "\n" not in said and said.encode()
    return None


def rows(tokens):
    """The rows as lists, once they are sound."""
    assert all(row.dtype == torch.long and row.ndim == 1 and 0 < len(row) <= CONTEXT for row in tokens.rows)
    found = [row.tolist() for row in tokens.rows]
    assert all(0 <= token < VOCABULARY for row in found for token in row)
    assert found
    return found


def check(calibration, tokenizer, config, samples=None, seqlen=None, seed=0):
    tokens = usable(lambda: calibration_tokens(calibration, tokenizer, config, samples, seqlen, seed))
    if tokens is not None:
        assert len(rows(tokens)) == samples if samples else len(rows(tokens)) <= 128
    return tokens


# Files.

SUFFIXES = st.sampled_from([".txt", ".raw", ".jsonl", ".md", "", ".TXT", ".json"])
LINES = st.lists(st.one_of(st.text(), st.sampled_from(["{", "[1]", "null", '{"text": "a"}', "1e999", "NaN", '"', " "])))
CONTENTS = st.one_of(
    st.binary(max_size=300),
    PROSE.map(str.encode),
    LINES.map("\n".join).map(str.encode),
    LINES.map("\r".join).map(str.encode),
)


@every
@given(suffix=SUFFIXES, content=CONTENTS, samples=SAMPLES, seqlen=SEQLENS)
@example(suffix=".jsonl", content=b"[" * 100_000, samples=None, seqlen=None)
@example(suffix=".jsonl", content=b'{"input_ids": [' + b"9" * 5000 + b"]}", samples=None, seqlen=None)
@example(suffix=".jsonl", content=b'{"text": "' + b"\\ud800 a cut " * 20 + b'"}', samples=None, seqlen=4)
@example(suffix=".txt", content=b"\xef\xbb\xbf" + TEXT.encode(), samples=None, seqlen=4)
def test_any_file(folder, tokenizer, config, suffix, content, samples, seqlen):
    path = folder / f"any{suffix}"
    path.write_bytes(content)
    tokens = check(str(path), tokenizer, config, samples, seqlen)
    assert tokens is None or tokens.source == path.name


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-1, 130), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ANY_TEXT, inner, max_size=3)),
    max_leaves=8,
)
IDS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=CONTEXT),
    st.lists(st.sampled_from([-1, 0, VOCABULARY - 1, VOCABULARY, True]), max_size=CONTEXT + 1),
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.one_of(st.just("user"), JSON), "content": st.one_of(TEXTS, JSON)}
)
RECORD = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"input_ids": IDS}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    st.fixed_dictionaries({}, optional={"text": JSON, "messages": JSON, "input_ids": JSON, "other": JSON}),
)
ALIKE = st.one_of(*(st.lists(kind, min_size=1, max_size=4) for kind in RECORD.original_strategies))  # mostly usable
RECORDS = st.one_of(ALIKE, st.lists(st.one_of(RECORD, JSON), max_size=4))
EMPTY_CHAT = [{"text": TEXT}, {"messages": []}]
HALF = [{"text": TEXT + "\ud83c"}]


@every
@given(records=RECORDS, samples=SAMPLES, seqlen=SEQLENS)
@example(records=EMPTY_CHAT, samples=None, seqlen=4)
@example(records=HALF, samples=None, seqlen=4)
def test_any_json_lines(folder, tokenizer, config, records, samples, seqlen):
    """A file of records gives what the records themselves give."""
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    from_file = check(str(path), tokenizer, config, samples, seqlen)
    if not all(isinstance(record, str) or absent(record) for record in records):
        from_list = check(records, tokenizer, config, samples, seqlen)
        assert (from_file and rows(from_file)) == (from_list and rows(from_list))


@every
@given(RECORDS)
def test_any_records_make_a_corpus_in_order(records):
    """Of each record the first field that is there is read; a field that is null or an empty list is not there."""
    corpus = usable(lambda: from_records(iter(records), "records"))
    if corpus is None:
        return
    assert (corpus.texts is None) != (corpus.rows is None)
    fields = [{} if record is None else {"text": record} if isinstance(record, str) else record for record in records]
    fields = [{"input_ids": record} if isinstance(record, list) else record for record in fields]
    there = [{name: value for name, value in record.items() if not absent(value)} for record in fields]
    if corpus.rows is not None:
        assert all(isinstance(token, int) for row in corpus.rows for token in row)
        expected = [record["input_ids"] for record in there if "input_ids" in record]
        if all(isinstance(token, int) for row in expected for token in row):
            assert corpus.rows == expected or not expected
        return
    found = [text if isinstance(text, str) else text.messages for text in corpus.texts]
    values = [record.get("messages", record.get("text")) for record in there]
    if not any(record and value is None for record, value in zip(there, values, strict=True)):  # no other columns
        assert found == [v if isinstance(v, str) else as_chat(v, "") for v in values if v is not None]


SOURCES = st.one_of(ANY_TEXT, st.text("~/.sotu:train\0 ", max_size=300)).filter(
    lambda source: source.partition(":")[0] not in ("c4", "wikitext2", "hf")  # the hub's
)


@every
@given(source=SOURCES)
@example(source=TEXT)  # the text itself in place of its name
@example(source="~nobody-of-this-name/text.txt")
@example(source="a\0b")
def test_any_name_of_a_source(source):
    usable(lambda: read_source(source, "train"))


# What Python code may give.

TENSORS = st.builds(
    lambda shape, dtype: (torch.arange(math.prod(shape)) % VOCABULARY).reshape(shape).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.long, torch.int32, torch.uint8, torch.bool, torch.float32, torch.complex64]),
)
BATCH = st.fixed_dictionaries(
    {"input_ids": st.one_of(st.lists(IDS, max_size=3), IDS, TENSORS, st.lists(TENSORS, max_size=3), JSON)},
    optional={"attention_mask": st.one_of(st.lists(IDS, max_size=3), TENSORS, JSON)},
)
GIVEN = st.one_of(BATCH, TENSORS, st.lists(TENSORS, max_size=3), st.lists(TEXTS, max_size=4), JSON, st.lists(JSON))


@every
@given(given=GIVEN.filter(lambda g: not isinstance(g, str)), samples=SAMPLES, seqlen=SEQLENS)
@example(given={"input_ids": [2**70]}, samples=None, seqlen=None)
@example(given={"input_ids": [[1, 2, 3]], "attention_mask": [[1]]}, samples=None, seqlen=None)
@example(given={"input_ids": [[1.5, 2.5]]}, samples=None, seqlen=None)
@example(given={"input_ids": torch.arange(5)}, samples=None, seqlen=None)
@example(given={"input_ids": 5}, samples=None, seqlen=None)
@example(given=[torch.rand(2)], samples=None, seqlen=None)
@example(given=torch.ones(2, 2, dtype=torch.complex64), samples=None, seqlen=None)
@example(given=["\ud800"], samples=None, seqlen=None)
def test_anything_given_from_python(tokenizer, config, given, samples, seqlen):
    tokens = check(given, tokenizer, config, samples, seqlen)
    if tokens is not None and isinstance(given, (dict, list)):  # a fraction is never cut down to an id
        ids = given["input_ids"] if isinstance(given, dict) else given
        whole = [t for t in (ids if isinstance(ids, list) else [ids]) if isinstance(t, torch.Tensor) and t.numel()]
        assert not any(t.is_floating_point() or t.is_complex() for t in whole)


TEMPLATES = {
    "raises": "{{ raise_exception('roles must\nalternate') }}",
    "reaches into nothing": "{{ messages[0].x.y }}",
    "is none": "{% if",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_that_the_template_refuses(tokenizer, config, kind):
    strict = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATES[kind])
    with pytest.raises(DataError) as caught:
        calibration_tokens([{"messages": [{"role": "user", "content": TEXT}]}], strict, config, None, 4, 0)
    assert "\n" not in str(caught.value)


# Crops and windows.


def pieces(ids, length):
    return {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}


@every
@given(texts=st.lists(PROSE, min_size=1, max_size=3), samples=SAMPLES, seqlen=SEQLENS, seed=SEEDS)
@example(texts=[TEXT * 8], samples=None, seqlen=None, seed=1)
@example(texts=[TEXT], samples=6, seqlen=12, seed=2)
def test_crops_are_pieces_of_the_text(tokenizer, config, texts, samples, seqlen, seed):
    """As many and as long as asked, cut from the joined tokens, and the same for the same seed."""
    records, length = [{"text": text} for text in texts], seqlen or CONTEXT
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    tokens = check(records, tokenizer, config, samples, seqlen, seed)
    fit = len(ids) // length if any(map(str.strip, texts)) else 0
    assert (tokens is None) == (fit < (samples or 1))
    if tokens is not None:
        found = rows(tokens)
        assert len(found) == (samples or min(128, fit)) and tokens.available == len(ids)
        assert {tuple(row) for row in found} <= pieces(ids, length)
        assert rows(check(records, tokenizer, config, samples, seqlen, seed)) == found


@every
@given(seed=st.one_of(st.integers(), st.integers(-(2**70), 2**70)))
@example(seed=2**64)
@example(seed=-(2**63) - 1)
def test_any_seed(tokenizer, config, seed):
    check([{"text": TEXT}], tokenizer, config, 2, 4, seed)


@every
@given(text=PROSE, seqlen=SEQLENS, windows=SAMPLES)
@example(text=TEXT, seqlen=7, windows=None)
def test_windows_are_the_text_from_its_start(folder, tokenizer, config, text, seqlen, windows):
    path, length = folder / "windows.txt", seqlen or CONTEXT
    path.write_text(text, encoding="utf-8", newline="")
    tokens = usable(lambda: evaluation_windows(str(path), tokenizer, config, seqlen, windows))
    ids = tokenizer(path.read_text(encoding="utf-8-sig"))["input_ids"]
    whole = len(ids) // length if text.strip() else 0
    assert (tokens is None) == (whole < (windows or 1))
    if tokens is not None:
        count = windows or whole
        assert [token for row in rows(tokens) for token in row] == ids[: count * length] and len(tokens.rows) == count
