"""Tasks: lm-eval's numbers are those of a scorer written here, and what cannot be asked is refused in one line."""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import DataError, ModelError, NumericsError, OptionError, SecateurError
from secateur.evaluation import task_files, tasks
from secateur.evaluation.tasks import TaskOptions, measure_tasks
from secateur.progress import Silent
from secateur.runtime.linear import PackedLinear
from tiny import TEXT, save_tiny, tensors_of

CPU = torch.device("cpu")
WORDS = [word.strip(".,;").lower() for word in TEXT.split()]


def some_words(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def arc(count=14, shift=0):
    """Questions with three to five answers of unlike lengths, under letters or numbers."""
    rows = []
    for seed in range(shift, shift + count):
        labels = list("ABCDE" if seed % 2 else "12345")[: 3 + seed % 3]
        answers = [some_words(f"{seed} {label}", 1 + 2 * n) for n, label in enumerate(labels)]
        choices = {"text": answers, "label": labels}
        key = random.Random(seed).choice(labels)
        rows.append({"id": str(seed), "question": some_words(seed, 4) + "?", "choices": choices, "answerKey": key})
    return rows


def winogrande(count=11):
    return [
        {"sentence": f"{some_words(n, 3)} _ {some_words(-n, 2)} ", "option1": some_words(n + 100, 1),
         "option2": some_words(n + 200, 2), "answer": str(1 + n * n % 3 % 2)}
        for n in range(count)
    ]  # fmt: skip


def boolq(count=9):
    return [
        {"question": some_words(n, 4), "answer": n % 3 == 0, "passage": some_words(-n - 1, 9)} for n in range(count)
    ]


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def model(model_directory):
    return model_directory("llama", max_position_embeddings=320)


@pytest.fixture(scope="module")
def scorer(model):
    """``scorer(context, continuation)``: log likelihood of the continuation's tokens, in float64."""
    language = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def score(context, continuation):
        known, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            logits_TV = language(torch.tensor([ids])).logits[0]
        return sum(float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(known, len(ids)))

    return score


def best(numbers):
    return max(range(len(numbers)), key=lambda n: numbers[n])


def measured(model, names, folder=None, progress=None, **options):
    return measure_tasks(model, TaskOptions(tuple(names.split(",")), folder, **options), CPU, progress or Silent())


def only(found):
    assert len(found["results"]) == 1
    return found["results"][0]


def arc_scores(scorer, rows, prefix=""):
    """Accuracy of the likeliest answer, and of the likeliest per character."""
    plain = norm = 0
    for row in rows:
        answers = row["choices"]["text"]
        scores = [scorer(f"{prefix}Question: {row['question']}\nAnswer:", f" {answer}") for answer in answers]
        gold = row["choices"]["label"].index(row["answerKey"])
        plain += best(scores) == gold
        norm += best([s / len(a) for s, a in zip(scores, answers, strict=True)]) == gold
    return plain / len(rows), norm / len(rows)


def test_accuracies_and_errors_are_those_of_a_scorer_of_our_own(model, scorer, tmp_path):
    rows = arc()
    found = measured(model, "arc_easy", write(tmp_path, "arc_easy.validation", rows), batch_size=3)
    plain, norm = arc_scores(scorer, rows)
    assert 0 < plain < 1 and 0 < norm < 1 and plain != norm  # else nothing is told apart
    metrics = only(found)["metrics"]
    assert {name: metric["value"] for name, metric in metrics.items()} == {"acc": plain, "acc_norm": norm}
    for p, metric in ((plain, metrics["acc"]), (norm, metrics["acc_norm"])):
        assert metric["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(rows) - 1)), rel=1e-12)


def test_winogrande_scores_what_follows_either_option(model, scorer, tmp_path):
    rows, right = winogrande(), 0
    for row in rows:
        before, after = row["sentence"].split("_")
        scores = [scorer(before + row[option], f" {after.strip()}") for option in ("option1", "option2")]
        right += best(scores) == int(row["answer"]) - 1
    assert 0 < right < len(rows)
    found = only(measured(model, "winogrande", write(tmp_path, "winogrande.validation", rows)))
    assert found["metrics"]["acc"]["value"] == right / len(rows)


def test_boolq_with_the_fields_of_the_original(model, scorer, tmp_path):
    rows, right = boolq(), 0
    for row in rows:
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        right += best([scorer(context, f" {answer}") for answer in ("no", "yes")]) == row["answer"]
    assert 0 < right < len(rows) and right != len(rows) - right
    found = only(measured(model, "boolq", write(tmp_path, "boolq.validation", rows)))
    assert found["metrics"]["acc"]["value"] == right / len(rows)
    renamed = [{"label": int(row["answer"]), **{k: v for k, v in row.items() if k != "answer"}} for row in rows]
    assert only(measured(model, "boolq", write(tmp_path, "boolq.validation", renamed))) == found


def test_the_document(model, tmp_path):
    write(tmp_path, "arc_easy.validation", arc())
    found = measured(model, "winogrande,arc_easy", write(tmp_path, "winogrande", winogrande()), batch_size=4, limit=6)
    first, second = found["results"]
    accuracies = [result["metrics"]["acc"]["value"] for result in found["results"]]
    assert found.pop("mean") == pytest.approx(sum(accuracies) / 2) and accuracies[0] != accuracies[1]
    assert found.pop("library") == f"lm-eval {importlib.metadata.version('lm_eval')}"
    assert found == {"dtype": "float32", "batch_size": 4, "limit": 6, "results": [first, second]}
    assert first.pop("metrics").keys() == {"acc"} and second.pop("metrics").keys() == {"acc", "acc_norm"}
    common = {"version": 1.0, "shots": 0, "questions": 6}
    assert first == {"task": "winogrande", "data": "winogrande.jsonl", **common}
    assert second == {"task": "arc_easy", "data": "arc_easy.validation.jsonl", **common}
    json.dumps(found)


def test_limit_asks_the_first_questions(model, tmp_path):
    rows = arc()
    first = measured(model, "arc_easy", write(tmp_path / "first", "arc_easy.test", rows[:5]))
    broken = write(tmp_path / "all", "arc_easy.test", [*rows[:5], {"question": "unread"}, *rows[5:]])
    limited = measured(model, "arc_easy", broken, limit=5)
    assert limited == {**first, "limit": 5} and only(limited)["questions"] == 5
    assert only(measured(model, "arc_easy", tmp_path / "first", limit=50))["questions"] == 5
    one = only(measured(model, "arc_easy", tmp_path / "first", limit=1))["metrics"]["acc"]
    assert one["value"] in (0, 1) and one["stderr"] is None


def test_the_split_that_lm_eval_asks_comes_first(model, tmp_path):
    write(tmp_path, "arc_easy.validation", arc(3))
    write(tmp_path, "arc_easy", arc(2))
    assert only(measured(model, "arc_easy", write(tmp_path, "arc_easy.test", arc(4))))["questions"] == 4


def test_shots_come_from_the_training_split(model, scorer, tmp_path):
    rows, example = arc(6), arc(1, shift=50)[0]
    write(tmp_path, "arc_easy.validation", rows)
    write(tmp_path, "arc_easy.train", [example, example])  # alike, so that it does not matter which is drawn
    answer = dict(zip(example["choices"]["label"], example["choices"]["text"], strict=True))[example["answerKey"]]
    shot = f"Question: {example['question']}\nAnswer: {answer}\n\n"
    found = only(measured(model, "arc_easy", tmp_path, shots=1))
    plain, norm = arc_scores(scorer, rows, prefix=shot)
    assert (plain, norm) != arc_scores(scorer, rows)
    assert (found["metrics"]["acc"]["value"], found["metrics"]["acc_norm"]["value"]) == (plain, norm)
    assert found["shots"] == 1


@pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
def test_rows_of_the_hub_are_asked_as_those_of_files(name, model, tmp_path, monkeypatch):
    """With the same shots too: which are drawn, and for which question, is lm-eval's choice."""
    import datasets

    rows = arc(26) if name == "arc_easy" else winogrande(26)
    splits = {"train": rows[:11], "validation": rows[11:17], "test": rows[17:]}
    for split in splits:
        write(tmp_path, f"{name}.{split}", splits[split])
    if name == "winogrande":  # whose test split lm-eval leaves alone
        (tmp_path / "winogrande.test.jsonl").unlink()
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name))
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lists, found = [[], []], []
    for folder, heard in zip((None, tmp_path), lists, strict=True):
        monkeypatch.setattr(tasks._Answers, "add_partial", lambda self, *answer, heard=heard: heard.append(answer))
        found.append(only(measured(model, name, folder, shots=2)))
    hub, file, questions = {
        "arc_easy": (("allenai/ai2_arc", "ARC-Easy"), "arc_easy.test.jsonl", 9),
        "winogrande": (("allenai/winogrande", "winogrande_xl"), "winogrande.validation.jsonl", 6),
    }[name]
    assert asked == [hub] and [result.pop("data") for result in found] == [hub[0], file]
    assert found[0] == found[1] and found[0]["shots"] == 2 and found[0]["questions"] == questions
    assert len(lists[0]) >= 2 * questions and lists[0] == lists[1]


def test_a_task_that_has_no_shots_keeps_to_it(model, tmp_path):
    answers = {"choices": ["cut", "grow"], "labels": [1, 0]}
    rows = [{"question": some_words(n, 4), "mc1_targets": answers, "mc2_targets": answers} for n in range(3)]
    found = only(measured(model, "truthfulqa_mc1", write(tmp_path, "truthfulqa_mc1", rows), shots=3))
    assert found["shots"] == 0


def test_as_many_answers_at_once_as_asked_for(model, tmp_path, monkeypatch):
    sizes, load = [], tasks.load_model

    def watched(*args):
        found = load(*args)
        found.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
        return found

    monkeypatch.setattr(tasks, "load_model", watched)
    measured(model, "arc_easy", write(tmp_path, "arc_easy", arc(4)), batch_size=3)
    assert max(sizes) == 3 and sizes.count(3) >= len(sizes) - 1


def test_a_packed_model_answers_as_its_dense_twin(model, tmp_path, monkeypatch):
    secateur.prune(model, tmp_path / "dense", method="magnitude", sparsity=0.6)
    secateur.pack(tmp_path / "dense", tmp_path / "packed")
    write(tmp_path / "data", "arc_easy.validation", arc())
    write(tmp_path / "data", "lambada_openai.test", [{"text": some_words(n, 8)} for n in range(6)])
    opened = []

    def load(*args):
        opened.append(tasks_load(*args))
        return opened[-1]

    tasks_load = tasks.load_model
    monkeypatch.setattr(tasks, "load_model", load)
    dense, packed = (
        measured(tmp_path / name, "arc_easy,lambada_openai", tmp_path / "data") for name in ("dense", "packed")
    )
    assert [any(isinstance(m, PackedLinear) for m in found.modules()) for found in opened] == [False, True]
    assert packed["results"][0] == dense["results"][0]
    twins = [found["results"][1]["metrics"]["perplexity"] for found in (dense, packed)]
    assert twins[1]["value"] == pytest.approx(twins[0]["value"], rel=1e-4)
    assert twins[1]["stderr"] == pytest.approx(twins[0]["stderr"], rel=1e-3) and twins[0]["stderr"] > 0
    whole = measured(model, "lambada_openai", tmp_path / "data")
    assert whole["results"][0]["metrics"]["perplexity"]["value"] != pytest.approx(twins[0]["value"], rel=1e-2)


def test_a_packed_model_in_bfloat16(model_directory, tmp_path):
    source = model_directory("llama", "bfloat16", max_position_embeddings=320)
    secateur.prune(source, tmp_path / "packed", method="magnitude", format="bitmask")
    assert measured(tmp_path / "packed", "arc_easy", write(tmp_path, "arc_easy", arc(3)))["dtype"] == "float32"


class Heard:
    """A progress that remembers: of each task its name, total, what was done, and whether it was finished."""

    def __init__(self):
        self.tasks, self.notes = [], []

    def start(self, task, total, done=0):
        self.tasks.append([task, total, done, False])

    def advance(self, done=1, note=None):
        self.tasks[-1][2] += done
        self.notes.append(note)

    def finish(self):
        self.tasks[-1][3] = True


def test_progress_hears_of_every_answer_and_nothing_is_printed(model, tmp_path, capfd, monkeypatch):
    import datasets
    import lm_eval.utils

    lm_eval.utils.setup_logging("INFO")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("multiprocessing.Pool", None)  # what is forked while torch computes may hang
    rows, heard = winogrande(), Heard()
    write(tmp_path, "winogrande", rows)
    write(tmp_path, "boolq", boolq())
    write(tmp_path, "hellaswag", HELLASWAG)
    write(tmp_path, "lambada_openai", [{"text": some_words(n, 8)} for n in range(6)])
    write(tmp_path, "wikitext", [{"page": TEXT}])
    torch.rand(1), random.random(), numpy.random.random()  # so that the states are not those after seeding
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    names = "winogrande,boolq,hellaswag,lambada_openai,wikitext"
    measured(model, names, tmp_path, heard)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()
    assert [(task[:7], finished) for task, *_, finished in heard.tasks] == [("reading", True)] + 2 * [("asking ", True)]
    assert heard.tasks[0][1] == 5 and heard.notes[:5] == names.split(",")
    assert all(total == done for _, total, done, _ in heard.tasks)
    read = sum(len(row["passage"]) + len(row["question"]) for row in boolq())
    assert heard.tasks[1][1] > 2 * read  # characters, once for each answer
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert state[2] == numpy.random.get_state()[1].tolist()


HELLASWAG = [
    {"ctx_a": "A man cuts.", "ctx_b": "the tree", "activity_label": "Cutting", "label": str(n % 2),
     "endings": ["grows [title] high.", "sleeps."]}
    for n in range(3)
]  # fmt: skip


def test_a_tag_is_all_its_tasks(model, tmp_path):
    write(tmp_path, "arc_easy.test", arc(3))
    with pytest.raises(DataError, match=r"has no arc_challenge\.test\.jsonl"):
        TaskOptions(("ai2_arc",), tmp_path).check()
    write(tmp_path, "arc_challenge.test", arc(4))
    found = measured(model, "ai2_arc,arc_easy", tmp_path)
    assert {result["task"]: result["questions"] for result in found["results"]} == {"arc_easy": 3, "arc_challenge": 4}


def test_generation_is_asked_too(model, model_directory, tmp_path):
    language, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("Question: 1 + 1?\nAnswer:", return_tensors="pt")
    ids = language.generate(**prompt, max_new_tokens=256, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    written = re.findall("[0-9]+", tokenizer.decode(ids, skip_special_tokens=True))[-1]
    rows = [{"question": "1 + 1?", "answer": f"#### {number}"} for number in (written, "77", "78", "79")]
    found = measured(model, "gsm8k", write(tmp_path, "gsm8k.test", rows), shots=0)
    flexible = only(found)["metrics"]["exact_match,flexible-extract"]
    assert flexible == {"value": 0.25, "stderr": pytest.approx(math.sqrt(0.25 * 0.75 / 3))}
    assert only(found)["metrics"]["exact_match,strict-match"]["value"] == 0
    assert found["mean"] is None
    with pytest.raises(OptionError, match=r"tasks gsm8k: cannot be asked of this model .*max.*64"):
        measured(model_directory("llama"), "gsm8k", tmp_path, shots=0)


def without(field, row=0, rows=None):
    rows = arc(3) if rows is None else rows
    return [{k: v for k, v in r.items() if n != row or k != field} for n, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("file", "rows", "options", "message"),
    [
        ("piqa", [{"goal": "g"}], {}, r"arc_easy\.validation\.jsonl or arc_easy\.jsonl, which .*there: piqa\.jsonl"),
        ("arc_easy", without("answerKey"), {}, r"arc_easy\.jsonl: row 1 has no field answerKey"),
        ("arc_easy", without("answerKey", 2), {}, r"arc_easy\.jsonl: row 3 has no field answerKey"),
        ("arc_easy", [{**row, "answerKey": "Z"} for row in arc(1)], {}, r"row 1 cannot .*: 'Z' is not in"),
        ("arc_easy", [{**row, "choices": {"text": ["a"]}} for row in arc(1)], {}, "row 1 has no field label"),
        ("boolq", without("answer", 4, boolq()), {}, r"boolq\.jsonl: row 5 has no field label"),
        ("boolq", [{k: v for k, v in row.items() if k != "answer"} for row in boolq()], {}, "row 1 has no field label"),
        ("boolq", [{**boolq()[0], "answer": -1}], {}, "row 1 has the answer -1, which is none of its 2 choices"),
        ("winogrande", without("answer", 1, winogrande()), {}, "row 2 has no field answer"),
        ("winogrande", [{**winogrande()[0], "answer": "3"}], {}, r"row 1 cannot be asked \(KeyError: '3'\)"),
        ("hellaswag", without("ctx_a", 1, HELLASWAG), {}, r"hellaswag\.jsonl: a row cannot be asked"),
        ("hellaswag", [{"ctx_b": "b"}], {}, r"hellaswag\.jsonl: a row has no field ctx_a"),
        ("arc_easy", [], {}, r"arc_easy\.jsonl: is empty"),
        ("arc_easy", [arc(1)[0], '{"id": '], {}, r"arc_easy\.jsonl: line 2 is not JSON"),
        ("arc_easy", ["", "[1]"], {}, r"arc_easy\.jsonl: line 2 is not an object"),
        ("arc_easy", [{**arc(1)[0], "question": 3}, *arc(1)], {}, r"arc_easy\.jsonl: a field is not of one type"),
        ("arc_easy", arc(3), {"shots": 2}, r"has no arc_easy\.train\.jsonl, from which its 2 shots are"),
        ("squadv2", [{"question": "q"}], {}, "task SQuAD2: is Python code that fetches its own data"),
    ],
)  # fmt: skip
def test_faults_of_files(tmp_path, file, rows, options, message):
    write(tmp_path, file, rows)
    name = "arc_easy" if file == "piqa" else file
    with pytest.raises(DataError, match=message) as fault:
        TaskOptions((name,), tmp_path, **options).check()
    assert "\n" not in str(fault.value)


def test_faults_of_examples(tmp_path):
    write(tmp_path, "arc_easy.test", arc(3))
    write(tmp_path, "arc_easy.train", arc(2))
    TaskOptions(("arc_easy",), tmp_path, shots=1).check()
    with pytest.raises(DataError, match=r"arc_easy\.train\.jsonl: 2 shots are drawn from more than 2 rows"):
        TaskOptions(("arc_easy",), tmp_path, shots=2).check()
    write(tmp_path, "arc_easy.train", without("answerKey", 2))
    with pytest.raises(DataError, match=r"arc_easy\.train\.jsonl: row 3 has no field answerKey"):
        TaskOptions(("arc_easy",), tmp_path, shots=1).check()
    TaskOptions(("arc_easy",), tmp_path, shots=0).check()  # which reads no examples


def test_rows_need_not_have_the_same_fields(tmp_path):
    write(tmp_path, "some", [{"a": 1}, {"a": 2, "b": 3}])
    assert list(task_files._dataset(tmp_path / "some.jsonl", "some")) == [{"a": 1, "b": None}, {"a": 2, "b": 3}]


def test_a_task_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"a": 1}\r\n{"a": 2}', encoding="utf-8-sig")
    assert list(task_files._dataset(tmp_path / "some.jsonl", "some")) == [{"a": 1}, {"a": 2}]


def test_a_task_file_that_was_not_fetched(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(DataError, match=r"some\.jsonl: a pointer of Git LFS .* git lfs pull"):
        task_files._dataset(tmp_path / "some.jsonl", "some")


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "arc_easy.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"arc_easy\.jsonl: is not UTF-8 text"):
        TaskOptions(("arc_easy",), tmp_path).check()
    with pytest.raises(DataError, match="nowhere: no such directory"):
        TaskOptions(("arc_easy",), tmp_path / "nowhere").check()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["arc_esay"], {}, "task 'arc_esay': lm-eval has no such task; did you mean .*arc_easy"),
        ([], {}, "tasks: name at least one"),
        (["piqa"], {"batch_size": 0}, "batch size 0: give a whole number of at least 1"),
        (["piqa"], {"limit": 0}, "limit 0: give a whole number of at least 1"),
        (["piqa"], {"limit": 0.5}, "limit 0.5: give a whole number"),
        (["piqa"], {"shots": -1}, "num-fewshot -1: give a whole number of at least 0"),
    ],
)
def test_faults_of_options(names, options, message, model):
    with pytest.raises(OptionError, match=message):
        TaskOptions(tuple(names), **options).check()
    with pytest.raises(OptionError, match=message):
        measure_tasks(model, TaskOptions(tuple(names), **options), CPU, Silent())


def test_without_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(OptionError, match=r"not installed; pip install 'secateur\[eval\]'"):
        TaskOptions(("arc_easy",)).check()


def test_without_data_and_network(model):
    TaskOptions(("arc_easy",)).check()
    with pytest.raises(DataError, match=r"task arc_easy: its data cannot be had from the hub \(.*--task-data") as fault:
        measured(model, "arc_easy")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(("flag", "why"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "asks about images")])
def test_tasks_that_are_not_for_us(flag, why, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, flag, True, raising=False)
    with pytest.raises(OptionError, match=f"task arc_easy: {why}"):
        TaskOptions(("arc_easy",), write(tmp_path, "arc_easy", arc(2))).check()


def test_faults_of_models(model, tokenizer, tmp_path):
    data = write(tmp_path, "arc_easy", arc(2))
    save_tiny(tmp_path / "mute", "llama")
    with pytest.raises(DataError, match="mute: has no tokenizer"):
        measured(tmp_path / "mute", "arc_easy", data)
    with pytest.raises(ModelError, match=r"no config\.json"):
        measured(tmp_path, "arc_easy", data)
    save_tiny(tmp_path / "damaged", "llama", tokenizer=tokenizer)
    (file,) = (tmp_path / "damaged").glob("*.safetensors")
    tensors = tensors_of(tmp_path / "damaged")
    tensors["model.norm.weight"][0] = math.nan
    from safetensors.torch import save_file

    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericsError, match="hold NaN or Inf"):
        measured(tmp_path / "damaged", "arc_easy", data)


def test_a_failure_leaves_the_process_as_it_was(model, tmp_path, capsys):
    import logging

    from lm_eval.api.task import ConfigurableTask
    from tqdm import tqdm

    download, bar = ConfigurableTask.download, tqdm.__init__
    with pytest.raises(SecateurError):
        measured(model, "arc_easy", write(tmp_path, "arc_easy", [{}]))
    assert (ConfigurableTask.download, tqdm.__init__) == (download, bar)
    assert logging.root.manager.disable == 0 and "DISABLE_MULTIPROC" not in os.environ
    print("heard")
    assert capsys.readouterr().out == "heard\n"


def test_long_questions_lose_their_beginning(model_directory, tmp_path):
    rows = [{**row, "question": some_words(n, 60) + " " + row["question"]} for n, row in enumerate(arc(3))]
    assert only(measured(model_directory("llama"), "arc_easy", write(tmp_path, "arc_easy", rows)))["questions"] == 3


def test_importing_the_module_does_not_import_lm_eval():
    code = "import sys, secateur.evaluation.tasks; assert not {'lm_eval', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_renamed_fields_are_known_to_lm_eval():
    """Each renaming is of a task that reads the new field, not the old one."""
    for name, fields in task_files.RENAMED.items():
        definition = tasks._known_tasks().task_index[name].yaml_path.read_text()
        assert all(to in definition and field not in definition for to, field in fields.items())
