"""Results as Markdown: what is shown, exactly, and that text from anywhere stays text when it is rendered."""

import copy
import doctest

import pytest
from markdown_it import MarkdownIt

from secateur.reporting.markdown import text as text_module
from secateur.reporting.markdown.comparison import comparison_markdown
from secateur.reporting.markdown.evaluation import evaluation_markdown
from secateur.reporting.markdown.text import (
    markdown_code,
    markdown_fence,
    markdown_table,
    markdown_text,
    plain,
    short_name,
)

HOSTILE = [
    "a|b",
    "a\\|b",
    "a\\",
    "`code`",
    "``",
    "two\nlines\r\n\r\n# heading",
    "<script>alert(1)</script>",
    "<!-- secateur:evaluation -->",
    "<http://evil.example>",
    "[text](http://evil.example)",
    "![image](http://evil.example/x.png)",
    "[ref]: http://evil.example",
    "*bold* **bold** _it_ __it__ ~~gone~~",
    "# heading",
    "- item",
    "+ item",
    "1. item",
    "2) item",
    "===",
    "---",
    "&lt;b&gt; &amp; &#35;",
    "$$x$$ \\(x\\) \\\\(x\\\\)",
    "me@evil.example",
    "http://evil.example www.evil.example",
    "org/name:train:text",
]


def rendered(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def inner(tokens):
    return [child for token in tokens for child in (token.children or [])]


def shown(tokens):
    return "".join(child.content for child in inner(tokens) if child.type in ("text", "code_inline"))


@pytest.mark.parametrize("escape", [markdown_text, markdown_code])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is_in_a_sentence_and_in_a_cell(text, escape):
    sentence = rendered(escape(text))
    assert [token.type for token in sentence] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in inner(sentence)} <= {"text", "text_special", "code_inline"}
    assert shown(sentence) == plain(text)

    table = rendered(markdown_table(["a", "b"], [["left", escape(text)], [escape(text), "right"]], "lr"))
    assert {child.type for child in inner(table)} <= {"text", "text_special", "code_inline"}
    cells = [token for token in table if token.type == "inline"]
    assert [shown([cell]) for cell in cells] == ["a", "b", "left", plain(text), plain(text), "right"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b|c", "a\\_b\\|c"),
        ("[a](b)", "\\[a\\](b)"),
        ("<b> & c", "&lt;b&gt; &amp; c"),
        ("\\(x\\) $$y$$", "&#92;(x&#92;) &#36;&#36;y&#36;&#36;"),  # Hugging Face looks for these before Markdown does
        ("https://a.b www.a.b A@b.c", "https\\://a.b www\\.a.b A\\@b.c"),  # GitHub links these
        ("WWW.a.b", "WWW\\.a.b"),
        ("-1 and 2.5, 2:4", "\\-1 and 2.5, 2:4"),
        ("2.5", "2.5"),
        ("  a\t\nb\u2028c ", "a b c"),
        ("a\x00b\x1b[2Jc\u202ed\ud800e", "a�b�\\[2Jc�d�e"),
        ("SmolLM2-135M", "SmolLM2-135M"),
    ],
)
def test_text_is_escaped_so(text, escaped):
    assert markdown_text(text) == escaped


@pytest.mark.parametrize(
    ("text", "code"),
    [("hf:ptb:penn:train:text", "`hf:ptb:penn:train:text`"), ("a b\nc", "`a b c`"), ("a|b", "a\\|b"), ("", "")],
)
def test_text_is_code_where_it_can_be(text, code):
    assert markdown_code(text) == code


def test_a_fence_is_longer_than_what_is_in_it():
    assert markdown_fence("a", "python") == "```python\na\n```"
    assert markdown_fence("a\n`````\nb") == "``````\na\n`````\nb\n``````"


def test_a_table():
    assert markdown_table(["a", "b"], [["1", "2"]], "lr") == "| a | b |\n| :-- | --: |\n| 1 | 2 |"
    for header, rows, align in ((["a"], [["1", "2"]], "l"), (["a", "b"], [["1", "2"]], "l")):
        with pytest.raises(ValueError):
            markdown_table(header, rows, align)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("/home/me/tiny", "tiny"),
        ("~/tiny/", "tiny"),
        ("./a/b", "b"),
        ("org/name", "org/name"),
        ("..", ".."),
        ("/", "/"),
    ],
)
def test_a_path_of_somebodys_machine_is_not_shown(name, short):
    assert short_name(name) == short


EVALUATION = {
    "text": "sotu:test", "seqlen": 256, "windows": 40, "tokens": 10240, "available_tokens": 174563, "loss": 3.352,
    "perplexity": 28.57,
}  # fmt: skip
SOFTWARE = {"secateur": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "machine": "Linux x86_64"}
CALIBRATION = {"source": "c4", "samples": 128, "seqlen": 2048, "tokens": 262144, "seed": 0, "digest": "x"}
DENSE = {
    "model": "smollm2", "method": "dense", "pattern": None, "sparsity": 0.0, "target": None, "calibration": None,
    "propagate": None, "format": "dense", "evaluation": EVALUATION, "loss_increase": None,
    "perplexity_increase": None, "perplexity_ratio": None, "tasks": None, "task_mean_change": None, "seconds": None,
    "peak_memory_bytes": None, "bytes": 269_000_000, "bytes_ratio": 1.0, "bench": None, "decode_ratio": None,
    "resident_ratio": None, "error": None,
}  # fmt: skip
WANDA = {
    **DENSE, "method": "wanda", "pattern": "row", "sparsity": 0.5, "target": 0.5, "calibration": CALIBRATION,
    "propagate": "block", "evaluation": {**EVALUATION, "loss": 4.036, "perplexity": 56.58}, "seconds": 61.4,
    "perplexity_increase": 28.01, "perplexity_ratio": 1.98040, "peak_memory_bytes": 1_040_000_000,
}  # fmt: skip
FAILED = {
    **WANDA, "method": "ria", "pattern": "matrix", "sparsity": None, "target": 0.9, "evaluation": None, "bytes": None,
    "perplexity_increase": None, "perplexity_ratio": None, "bytes_ratio": None, "seconds": None,
    "peak_memory_bytes": None, "error": "out of <memory>",
}  # fmt: skip


def document(*rows, **changes):
    return {
        "schema": 1, "command": "secateur compare smollm2 --methods wanda,ria", "date": "2026-11-22T13:00:00+00:00",
        "software": SOFTWARE, "processor": "AMD EPYC", "threads": 2, "rows": copy.deepcopy(list(rows)), **changes,
    }  # fmt: skip


def table_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_a_comparison_as_a_page():
    assert (
        comparison_markdown(document(DENSE, WANDA, FAILED))
        == """\
# smollm2, dense and pruned

| Method | Pattern | Sparsity | Perplexity | Change | Ratio | Size | Size, ratio | Time to prune | Peak memory |
| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |
| dense | – | 0.0% | 28.57 | – | – | 269.0 MB | 1.00 | – | – |
| `wanda` | `row` | 50.0% | 56.58 | +28.01 | 1.98 | 269.0 MB | 1.00 | 1 min 1 s | 1.04 GB |
| `ria` | `matrix` | (90.0%) | – | – | – | – | – | – | – |

- Perplexity: `sotu:test`, 40 windows of 256 tokens, 10,240 of 174,563 tokens; change and ratio against the dense model.
- Calibration: `c4`, 128 sequences, 262,144 tokens, seed 0.
- Size: of all tensors on disk, stored as `dense`.
- Computed on AMD EPYC, 2 threads, with Secateur 0.1.0, torch 2.13.0+cpu, python 3.11.7, Linux x86\\_64; \
2026-11-22T13:00:00+00:00.
- Failed: `ria`, `matrix`, (90.0%): out of &lt;memory&gt;

```
secateur compare smollm2 --methods wanda,ria
```
"""
    )


def test_only_what_was_measured_has_a_column():
    lonely = {**DENSE, "evaluation": None, "bytes": None, "bytes_ratio": None}
    assert table_of(comparison_markdown(document(lonely)))[0] == "| Method | Sparsity |"


TASKS = {
    "library": "lm-eval 0.4.13", "dtype": "float32", "batch_size": 8, "limit": None, "mean": 0.441,
    "results": [
        {"task": "arc_easy", "version": 1.0, "shots": 0, "questions": 2376, "data": "allenai/ai2_arc",
         "metrics": {"acc": {"value": 0.441, "stderr": 0.0208}, "acc_norm": {"value": 0.4, "stderr": None}}},
    ],
}  # fmt: skip
BENCH = {
    "processor": "AMD EPYC", "threads": 2, "prompt": 128, "tokens": 32, "rounds": 5, "software": SOFTWARE,
    "models": [
        {"name": "/tmp/packed", "dtype": "bfloat16", "bytes": 176_100_000, "resident_bytes": 197_000_000,
         "speeds": [{"batch": 1, "prefill": {"median": 601.0}, "decode": {"median": 30.1}}]},
        {"name": "/tmp/dense", "dtype": "float32", "bytes": 269_000_000, "resident_bytes": 276_800_000,
         "speeds": [{"batch": 1, "prefill": {"median": 671.0}, "decode": {"median": 16.9}}]},
    ],
}  # fmt: skip


def test_every_measurement_has_its_column_and_its_note():
    full = {
        **WANDA, "tasks": TASKS, "task_mean_change": -0.05, "bench": BENCH, "decode_ratio": 1.781,
        "resident_ratio": 0.7117, "format": "bitmask", "bytes": 176_100_000, "bytes_ratio": 0.6547,
        "evaluation": {**WANDA["evaluation"], "fidelity": {"kl": 0.3124, "top1": 0.8149, "blocks": [0.1]}},
    }  # fmt: skip
    text = comparison_markdown(document(DENSE, full))
    assert table_of(text)[0] == (
        "| Method | Pattern | Sparsity | Perplexity | Change | Ratio | KL, nats | Top-1 | Tasks | Tasks, change | Size "
        "| Size, ratio | Memory | Memory, ratio | Decode speed, ratio | Time to prune | Peak memory |"
    )
    assert table_of(text)[3] == (
        "| `wanda` | `row` | 50.0% | 56.58 | +28.01 | 1.98 | 0.312 | 81.5% | 0.441 | -0.050 | 176.1 MB | 0.65 "
        "| 197.0 MB | 0.71 | 1.78 | 1 min 1 s | 1.04 GB |"
    )
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes[1].startswith("- KL: mean divergence")
    assert notes[2] == "- Tasks: the mean of acc over `arc_easy` (2,376 questions, 0 shots); lm-eval 0.4.13."
    assert notes[4] == "- Size: of all tensors on disk, stored as `dense`, `bitmask`."
    assert notes[5] == (
        "- Memory and decode speed: 128 tokens of prompt, 32 new, median of 5 rounds in turn with the dense model."
    )


def test_models_and_calibration_have_columns_where_they_vary():
    other = {**WANDA, "model": "org/other", "calibration": {**CALIBRATION, "seed": 3, "samples": 64, "source": "sotu"}}
    text = comparison_markdown(document(WANDA, other))
    assert text.startswith("# 2 models, dense and pruned\n")
    assert table_of(text)[0].startswith("| Model | Method | Pattern | Calibration | Samples | Seed | Sparsity |")
    assert table_of(text)[3].startswith("| `org/other` | `wanda` | `row` | `sotu` | 64 | 3 | 50.0% |")
    only_seeds = comparison_markdown(document(WANDA, {**WANDA, "calibration": {**CALIBRATION, "seed": 1}}))
    assert table_of(only_seeds)[0].startswith("| Method | Pattern | Seed | Sparsity |")


@pytest.mark.parametrize(
    ("perplexity", "words"),
    [(None, "beyond measure"), (28.568, "28.57"), (999.994, "999.99"), (2941.3, "2,941"), (8.123e9, "8.1e+09")],
)
def test_perplexities_are_rounded_for_people(perplexity, words):
    row = {**WANDA, "evaluation": {**EVALUATION, "perplexity": perplexity}}
    assert f"| 50.0% | {words} |" in comparison_markdown(document(row))


def test_a_hostile_comparison_is_one_table_and_no_links():
    for text in HOSTILE:
        row = {
            **WANDA, "model": text, "method": text, "pattern": text, "error": text,
            "calibration": {**CALIBRATION, "source": text}, "evaluation": {**EVALUATION, "text": text},
        }  # fmt: skip
        page = comparison_markdown(document(row, {**DENSE, "model": "m"}, processor=text, command=text, date=text))
        tokens = rendered(page)
        kinds = [token.type for token in tokens]
        assert (kinds.count("table_open"), kinds.count("heading_open"), kinds.count("fence")) == (1, 1, 1)
        assert "html_block" not in kinds
        assert {child.type for child in inner(tokens)} <= {"text", "text_special", "code_inline"}
        assert kinds.count("td_open") == 2 * kinds.count("th_open")


MEASURED = {"schema": 1, "date": "2026-11-22T08:23:27+00:00", **EVALUATION, "loss": 4.036, "perplexity": 56.58}


def test_an_evaluation_shows_the_newest_of_each_kind():
    older = {**MEASURED, "perplexity": 99.0, "date": "2026-11-01T00:00:00+00:00"}
    fewer = {**MEASURED, "windows": 8, "tokens": 2048, "perplexity": None}
    text = evaluation_markdown([older, fewer, MEASURED], EVALUATION)
    assert table_of(text) == [
        "| Perplexity on | Dense model | This model | Ratio | Measured |",
        "| :-- | --: | --: | --: | :-- |",
        "| `sotu:test`, 8 windows of 256 tokens, 2,048 of 174,563 tokens | – | beyond measure | – | 2026-11-22 |",
        "| `sotu:test`, 40 windows of 256 tokens, 10,240 of 174,563 tokens | 28.57 | 56.58 | 1.98 | 2026-11-22 |",
    ]
    assert text.endswith(
        "Pruning in one shot costs quality. What is known of it here is perplexity on `sotu:test`; other texts, "
        "languages and tasks, long contexts, instructions and safety were not measured, and may have suffered more."
    )


def test_a_dense_perplexity_counts_only_on_the_same_tokens():
    same_name = {**EVALUATION, "available_tokens": 200000}
    assert "Dense model" not in evaluation_markdown([MEASURED], same_name)
    own = {**MEASURED, "against": {"model": "x", "loss": 3.0, "perplexity": 20.0}}
    assert "| 20.00 | 56.58 | 2.83 |" in evaluation_markdown([own], EVALUATION)


def test_fidelity_is_shown_and_explained():
    line = {**MEASURED, "fidelity": {"kl": 0.31239, "top1": 0.8149, "blocks": []}}
    text = evaluation_markdown([line], None)
    assert table_of(text)[0] == "| Perplexity on | This model | KL, nats | Top-1 | Measured |"
    assert "| 56.58 | 0.312 | 81.5% | 2026-11-22 |" in text
    assert text_module.FIDELITY in text


def tasks(**changes):
    return {"schema": 1, "date": "2026-11-23T00:00:00+00:00", "tasks": {**TASKS, **changes}}


def test_tasks_with_their_errors():
    line = tasks(limit=100)
    dense = {"value": 0.5, "stderr": 0.01}
    line["against"] = {
        "model": "d",
        "tasks": {"mean": 0.5, "results": [{"task": "arc_easy", "metrics": {"acc": dense}}]},
    }
    text = evaluation_markdown([tasks(mean=0.1), line], None)
    assert table_of(text) == [
        "| Task | Metric | Dense model | This model | Questions | Shots | Data |",
        "| :-- | :-- | --: | --: | --: | --: | :-- |",
        "| `arc_easy` | `acc` | 0.500 ± 0.010 | 0.441 ± 0.021 | 2,376 | 0 | `allenai/ai2_arc` |",
        "| `arc_easy` | `acc_norm` | – | 0.400 | 2,376 | 0 | `allenai/ai2_arc` |",
    ]
    assert (
        "± is one standard error; mean of acc 0.441 (this model); mean of acc 0.500 (dense model); only the first 100 "
        "questions of each task; lm-eval 0.4.13 in float32; 2026-11-23."
    ) in text
    assert "What is known of it here is `arc_easy`;" in text


def test_other_shots_are_another_kind():
    five = tasks(results=[{**TASKS["results"][0], "shots": 5}])
    assert len(table_of(evaluation_markdown([tasks(), five, tasks()], None))) == 2 * 4


def test_speed_with_its_conditions():
    line = {"schema": 1, "date": "2026-11-24T00:00:00+00:00", "bench": BENCH}
    text = evaluation_markdown([{**line, "bench": {**BENCH, "threads": 64}}, line], None)
    assert table_of(text) == [
        "| Speed | This model (bfloat16) | `dense` (float32) | Ratio |",
        "| :-- | --: | --: | --: |",
        "| Bytes on disk | 176.1 MB | 269.0 MB | 0.65 |",
        "| Resident memory | 197.0 MB | 276.8 MB | 0.71 |",
        "| Prefill, batch 1 | 601.0 tokens/s | 671.0 tokens/s | 0.90 |",
        "| Decode, batch 1 | 30.1 tokens/s | 16.9 tokens/s | 1.78 |",
    ]
    assert "AMD EPYC, 2 threads; 128 tokens of prompt, 32 new, median of 5 rounds; 2026-11-24." in text
    assert "How much was not measured on this model" in text
    alone = evaluation_markdown([{**line, "bench": {**BENCH, "models": BENCH["models"][:1]}}], None)
    assert table_of(alone)[0] == "| Speed | This model (bfloat16) |"


def test_nothing_measured_says_so():
    assert evaluation_markdown([], None) == (
        "Pruning in one shot costs quality. How much was not measured on this model: do that with your own text and "
        "tasks before you rely on it."
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"windows": "<b>"}, {"seqlen": None}, {"perplexity": "|"}, {"tokens": []}, {"against": 7},
        {"fidelity": {"kl": "x"}}, {"tasks": 3}, {"tasks": {"results": 3}}, {"bench": {}}, {"bench": {"models": []}},
        {"tasks": {**TASKS, "results": [{"task": "a", "shots": "<b>", "questions": 1, "metrics": {}}]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_line_harms_no_other(damage):
    sound = {**MEASURED, "text": "sound"}
    text = evaluation_markdown([{**MEASURED, **damage}, sound, tasks()], None)
    assert "| `sound`, 40 windows" in text and "`arc_easy`" in text
    assert "<b>" not in text


def test_hostile_evaluations_make_no_links_and_break_no_table():
    for text in HOSTILE:
        result = {**TASKS["results"][0], "task": text, "data": text, "metrics": {text: {"value": 0.5, "stderr": None}}}
        models = [{**model, "name": text, "dtype": text} for model in BENCH["models"]]
        lines = [
            {**MEASURED, "text": text, "date": text},
            {**tasks(results=[result], library=text), "date": text},
            {"date": text, "bench": {**BENCH, "processor": text, "models": models}},
        ]
        tokens = rendered(evaluation_markdown(lines, None))
        kinds = [token.type for token in tokens]
        assert kinds.count("table_open") == 3 and kinds.count("th_open") == 3 + 6 + 4
        assert kinds.count("td_open") == 3 + 6 + 4 * 4
        assert not {"html_block", "heading_open", "fence", "hr", "bullet_list_open"} & set(kinds)
        assert {child.type for child in inner(tokens)} <= {"text", "text_special", "code_inline"}


def test_examples_in_docstrings():
    found = doctest.testmod(text_module)
    assert found.attempted >= 5 and found.failed == 0
