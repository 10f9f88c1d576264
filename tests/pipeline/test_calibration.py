"""What can be handed over for calibration, and which tokens come of it."""

import json

import datasets
import pytest
import torch

import secateur
from secateur.errors import DataError, OptionError, SecateurError
from secateur.pipeline.calibration import calibration_tokens, evaluation_windows
from secateur.pruning import SUMSQ, Method
from tiny import TEXT, tiny_config, tiny_model

CONTEXT = 64
LONG = TEXT * 20


@pytest.fixture(scope="module")
def config():
    return tiny_config("llama")


@pytest.fixture
def tokens(tokenizer, config):
    """``tokens(calibration)``: the calibration rows."""

    def make(calibration, samples=None, seqlen=None, seed=0, tokenizer=tokenizer):
        return calibration_tokens(calibration, tokenizer, config, samples, seqlen, seed)

    return make


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LONG)
    return str(path)


def lists(tokens):
    assert all(row.dtype == torch.long and row.ndim == 1 for row in tokens.rows)
    return [row.tolist() for row in tokens.rows]


def tokens_heard(calibration, **options):
    """How many tokens the statistics of a run count."""
    heard = []

    def prune(W_OI, statistics, sparsity, pattern):
        heard.extend([] if W_OI.shape == (8, 8) else [statistics.tokens])
        return W_OI, torch.ones_like(W_OI, dtype=torch.bool)

    secateur.prune(tiny_model("llama"), method=Method(prune, frozenset({SUMSQ})), calibration=calibration, **options)
    assert len(set(heard)) == 1
    return heard[0]


# Rows of their own length.


def test_strings_are_sequences_of_their_own_length(tokens, tokenizer, messages):
    texts = ["A good cut.", "In spring the branches are short and the light comes in", "bud"]
    found = tokens(texts)
    assert lists(found) == tokenizer(texts)["input_ids"]
    assert len({len(row) for row in found.rows}) == 3
    assert found.tokens == found.available == sum(map(len, found.rows)) and found.seqlen == max(map(len, found.rows))
    assert sum("enough to try" in m and "too few to trust" in m for m in messages) == 1
    assert tokens_heard(texts, tokenizer=tokenizer) == found.tokens
    assert lists(tokens(text for text in texts)) == lists(tokens(tuple(texts))) == lists(found)


def test_strings_are_cut_at_seqlen_or_the_context(tokens, tokenizer):
    whole = tokenizer(LONG)["input_ids"]
    assert lists(tokens([LONG])) == [whole[:CONTEXT]]
    assert lists(tokens([LONG], seqlen=10)) == [whole[:10]]


def test_strings_without_tokens_are_left_out(tokens, tokenizer, messages):
    no_bos = json.dumps({**json.loads(tokenizer.backend_tokenizer.to_str()), "post_processor": None})
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer.from_str(no_bos))
    assert len(tokens(["", "A good cut.", ""], tokenizer=bare).rows) == 1
    assert "the given strings: 2 of 3 have no tokens and are skipped" in messages
    with pytest.raises(DataError, match="no tokens"):
        tokens(["", ""], tokenizer=bare)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_a_tensor_of_ids(tokens, dtype):
    ids = torch.randint(0, 128, (4, 12)).to(dtype)
    found = tokens(ids)
    assert torch.equal(torch.stack(found.rows), ids.long())
    assert tokens_heard(ids) == 48


def test_tensors_of_their_own_length(tokens):
    given = [torch.arange(3, 8), torch.arange(5, 9)[None], torch.arange(9)]
    assert lists(tokens(given)) == [t.reshape(-1).tolist() for t in given]


@pytest.mark.parametrize("kind", ["pt", "np", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_positions_never_count(tokens, tokenizer, side, kind):
    texts = ["A good cut.", "In spring the branches are short", "bud"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors=kind)
    assert lists(tokens(batch)) == tokenizer(texts)["input_ids"]
    assert lists(tokens(dict(batch))) == tokenizer(texts)["input_ids"]
    assert tokens_heard(batch) == sum(len(row) for row in tokenizer(texts)["input_ids"])


def test_a_batch_without_padding_or_mask(tokens, tokenizer):
    texts = ["A good cut.", "bud"]
    assert lists(tokens(tokenizer(texts))) == lists(tokens({"input_ids": tokenizer(texts)["input_ids"]}))


@pytest.mark.parametrize("kind", ["pt", None])
def test_a_batch_of_one_text_is_one_row(tokens, tokenizer, kind):
    one = tokenizer("In spring the branches are short", return_tensors=kind)
    assert lists(tokens(one)) == [tokenizer("In spring the branches are short")["input_ids"]]


@pytest.mark.parametrize("where", ["list", "datasets", "jsonl", "parquet"])
def test_rows_of_ids_are_used_whole_in_order(tokens, tmp_path, where, messages):
    rows = [[5, 6, 7], [8, 9], [10] * 20, [11, 12, 13, 14]]
    records = [{"input_ids": row} for row in rows]
    if where == "list":
        given = records
    elif where == "datasets":
        given = datasets.Dataset.from_list(records)
    elif where == "jsonl":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "\n")
        given = str(tmp_path / "rows.jsonl")
    else:
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
        given = str(tmp_path / "rows.parquet")
    assert lists(tokens(given)) == rows
    assert any("4 sequences, fewer than the usual 128" in m for m in messages)
    assert lists(tokens(given, samples=2, seqlen=8)) == rows[:2]
    assert lists(tokens(given, tokenizer=None)) == rows


# Texts that are joined and cut.


@pytest.mark.parametrize("where", ["list", "datasets", "jsonl", "parquet"])
def test_records_of_text_are_joined_by_blank_lines_and_cut(tokens, tokenizer, tmp_path, where):
    texts = [LONG[:300], LONG[300:900], LONG[900:]]
    records = [{"text": text, "id": n} for n, text in enumerate(texts)]
    (tmp_path / "joined.txt").write_text("\n\n".join(texts))
    if where == "list":
        given = records
    elif where == "datasets":
        given = datasets.Dataset.from_list(records)
    elif where == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in records))
        given = str(tmp_path / "rows.jsonl")
    else:
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
        given = str(tmp_path / "rows.parquet")
    found, joined = tokens(given, seqlen=16), tokens(str(tmp_path / "joined.txt"), seqlen=16)
    assert lists(found) == lists(joined)
    assert found.available == len(tokenizer("\n\n".join(texts))["input_ids"])


@pytest.mark.parametrize("where", ["list", "jsonl"])
def test_chats_go_through_the_template(tokens, tokenizer, tmp_path, where):
    chats = [[{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes"}]] * 3
    given = [{"messages": chat} for chat in chats]
    if where == "jsonl":
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, given)))
        given = str(tmp_path / "chats.jsonl")
    ids = tokenizer("\n\n".join([f"<s>user: {TEXT}</s><s>assistant: yes</s>"] * 3), add_special_tokens=False)
    found = tokens(given, seqlen=8, samples=3)
    assert found.available == len(ids["input_ids"])
    whole = " ".join(map(str, ids["input_ids"]))
    assert all(" ".join(map(str, row)) in whole for row in lists(found))


def test_chats_need_a_template(tokens, tokenizer):
    plain = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="chat template"):
        tokens([{"messages": [{"role": "user", "content": TEXT}]}], tokenizer=plain)


def test_crops_are_cut_from_the_text_at_random(tokens, tokenizer, text_file):
    ids = tokenizer(LONG)["input_ids"]
    whole = " ".join(map(str, ids))
    found = tokens(text_file, samples=50, seqlen=16)
    assert [len(row) for row in found.rows] == [16] * 50
    assert all(" ".join(map(str, row)) in whole for row in lists(found))
    assert found.available == len(ids) and found.tokens == 800 and found.source == "text.txt"
    starts = {" ".join(map(str, ids[i : i + 16])): i for i in range(len(ids))}
    places = [starts[" ".join(map(str, row))] for row in lists(found)]
    assert any(place % 16 for place in places) and len(set(places)) > 25


def test_the_seed_decides_the_crops(tokens, text_file):
    first, again, other = (tokens(text_file, samples=20, seqlen=16, seed=s) for s in (3, 3, 4))
    assert lists(first) == lists(again) != lists(other)
    assert first.digest == again.digest != other.digest


def test_seqlen_is_the_context_or_what_is_asked(tokens, text_file):
    assert tokens(text_file).seqlen == CONTEXT
    assert tokens(text_file, seqlen=CONTEXT).seqlen == CONTEXT
    for wrong in (CONTEXT + 1, 1, 0, -5):
        with pytest.raises(OptionError, match=f"seqlen {wrong}"):
            tokens(text_file, seqlen=wrong)


def test_fewer_samples_are_used_and_said_more_are_refused(tokens, text_file, messages):
    found = tokens(text_file)
    assert 0 < len(found.rows) < 128 and len(found.rows) == found.available // CONTEXT
    assert any(f"{len(found.rows)} sequences of 64 tokens, fewer than the usual 128" in m for m in messages)
    assert len(tokens(text_file, samples=len(found.rows)).rows) == len(found.rows)
    with pytest.raises(OptionError, match=f"samples {len(found.rows) + 1}"):
        tokens(text_file, samples=len(found.rows) + 1)
    for wrong in (0, -1):
        with pytest.raises(OptionError, match=f"samples {wrong}"):
            tokens(text_file, samples=wrong)
    with pytest.raises(OptionError, match="samples 3"):
        tokens(["a", "b"], samples=3)


def test_a_text_shorter_than_one_sequence_is_refused(tokens, tmp_path):
    (tmp_path / "short.txt").write_text("A good cut.")
    with pytest.raises(DataError, match=r"short\.txt: \d+ tokens are less than one sequence of 64"):
        tokens(str(tmp_path / "short.txt"))


# What cannot be used.

HOSTILE = {
    "empty list": [],
    "empty generator": iter(()),
    "empty tensor": torch.zeros(0, 5, dtype=torch.long),
    "rows of nothing": [{"input_ids": []}],
    "floats": torch.rand(2, 5),
    "one dimension": torch.arange(5),
    "a number": 7,
    "nothing": None,
    "numbers": [1, 2, 3],
    "mixed": ["a", torch.arange(4)],
    "mapping": {"text": "a"},
    "records without a field": [{"title": "a", "body": "b"}],
    "rows and texts": [{"text": "a"}, {"input_ids": [4]}],
    "id outside the vocabulary": torch.full((2, 5), 128),
    "negative id": torch.full((2, 5), -1),
    "id of a record": [{"input_ids": [4, 500]}],
    "longer than the context": torch.full((2, 65), 5),
    "ids are a string": [{"input_ids": "abc"}],
    "ids are a number": [{"input_ids": 5}],
    "ids are nested too deep": [{"input_ids": [[[4, 5, 6]]]}],
    "ids are fractions": [{"input_ids": [4.5, 5.5]}],
    "ids are huge": [{"input_ids": [2**70]}],
    "text is null": [{"text": None}] * 3,
    "text is a number": [{"text": 5}] * 3,
    "messages are strings": [{"messages": ["a"]}] * 30,
    "messages are null": [{"messages": None}] * 30,
    "no such source": "c5",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_used_is_refused_in_one_line(tokens, kind):
    with pytest.raises(SecateurError) as caught:
        tokens(HOSTILE[kind])
    assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("calibration", [["A good cut."], [{"text": LONG}]])
def test_text_needs_a_tokenizer(tokens, calibration):
    with pytest.raises(DataError, match="needs a tokenizer"):
        tokens(calibration, tokenizer=None)


# Windows.


def test_windows_cover_the_text_without_overlap(tokenizer, config, text_file):
    ids = tokenizer(LONG)["input_ids"]
    found = evaluation_windows(text_file, tokenizer, config, 16, None)
    assert sum(lists(found), []) == ids[: len(ids) // 16 * 16]  # noqa: RUF017
    assert found.available == len(ids) and found.seqlen == 16
    assert lists(evaluation_windows(text_file, tokenizer, config, 16, 3)) == lists(found)[:3]
    for wrong in (0, 10_000):
        with pytest.raises(OptionError, match=f"windows {wrong}"):
            evaluation_windows(text_file, tokenizer, config, 16, wrong)
    assert evaluation_windows(text_file, tokenizer, config, None, None).seqlen == CONTEXT


def test_windows_of_rows(tmp_path, tokenizer, config, messages):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7]}\n{"input_ids": [8]}\n{"input_ids": [9, 10]}')
    found = evaluation_windows(str(tmp_path / "rows.jsonl"), None, config, None, None)
    assert lists(found) == [[5, 6, 7], [9, 10]]  # one token predicts nothing
    assert messages == ["rows.jsonl: 1 of 3 rows hold no token to predict and are skipped"]
    with pytest.raises(OptionError, match="windows 3"):
        evaluation_windows(str(tmp_path / "rows.jsonl"), None, config, None, 3)
