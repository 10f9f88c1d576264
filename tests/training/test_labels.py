"""`finetune` learns what labels name and nothing else: in the loss, on held-out rows, with a teacher and padding."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.progress import Silent
from tiny import save_tiny, tensors_of

QUICK = {"train": "full", "progress": Silent(), "learning_rate": 1e-9}
ROWS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(3)).tolist()
LENGTHS = (12, 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A dense model and a pruned one, in float32."""
    folder = tmp_path_factory.mktemp("labels")
    save_tiny(folder / "dense", "llama", tokenizer=tokenizer)
    secateur.prune(folder / "dense", folder / "pruned", method="magnitude", pattern="2:4", progress=Silent())
    return folder


def record(ids, learnt):
    """A row of which the last `learnt` tokens are learnt."""
    return {"input_ids": ids, "labels": [-100] * (len(ids) - learnt) + ids[len(ids) - learnt :]}


def losses(model, ids):
    """The loss of every predicted token, [T - 1]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def divergences(known, own, ids):
    """KL(known || own) at every predicted token, [T - 1]."""
    logs = [model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in (known, own)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1)


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("teacher", [None, "dense"])
def test_the_loss_counts_what_is_learnt_and_no_padding(teacher, models, tmp_path):
    rows = [ids[:length] for ids, length in zip(ROWS, LENGTHS, strict=False)]
    data = [record(rows[0], 3), record(rows[1], 5)]
    options = {} if teacher is None else {"teacher": str(models / teacher)}
    report = secateur.finetune(models / "pruned", tmp_path / "out", data, steps=1, **options, **QUICK)
    with torch.no_grad():
        own = loaded(models / "pruned")
        each = [
            losses(own, ids) if teacher is None else divergences(loaded(models / teacher), own, ids) for ids in rows
        ]
    expected = torch.cat([each[0][-3:], each[1][-5:]]).mean()
    assert report["training"]["losses"][0][1] == pytest.approx(float(expected), rel=1e-4)
    assert float(torch.cat(each).mean()) != pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("teacher", [None, "dense"])
def test_held_out_rows_count_what_is_learnt(teacher, models, tmp_path):
    """The last of ten rows is held out."""
    data = [record(ROWS[0], 4)] * 9 + [record(ROWS[1], 2)]
    options = {} if teacher is None else {"teacher": str(models / teacher)}
    report = secateur.finetune(models / "pruned", tmp_path / "out", data, steps=9, batch_size=1, **options, **QUICK)
    with torch.no_grad():
        own = loaded(models / "pruned")
        each = losses(own, ROWS[1]) if teacher is None else divergences(loaded(models / teacher), own, ROWS[1])
    assert report["training"]["held_out_rows"] == 1
    assert report["training"]["held_out"][0][1] == pytest.approx(float(each[-2:].mean()), rel=1e-4)


FORMS = {
    "labels": lambda ids: record(ids, 4),
    "completion_mask": lambda ids: {"input_ids": ids, "completion_mask": [0] * 8 + [1] * 4},
    "assistant_masks": lambda ids: {"input_ids": ids, "assistant_masks": [0] * 8 + [1] * 4},
    "padded on the left": lambda ids: {
        "input_ids": [0, 0, *ids],
        "attention_mask": [0, 0, *[1] * 12],
        "labels": [-100] * 10 + ids[8:],
    },
    "pairs": lambda ids: (torch.tensor([ids]), torch.tensor([[-100] * 8 + ids[8:]])),
    "tensors": lambda ids: {name: torch.tensor([part]) for name, part in record(ids, 4).items()},
}


@pytest.fixture(scope="module")
def reference(models, tmp_path_factory):
    """The weights after training on four rows whose last four tokens are learnt."""
    out = tmp_path_factory.mktemp("reference") / "out"
    data = [record(ids, 4) for ids in ROWS]
    report = secateur.finetune(models / "pruned", out, data, steps=3, **{**QUICK, "learning_rate": 0.01})
    return report["plan"]["data"]["digest"], tensors_of(out)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels_trains_the_same_model(form, models, tmp_path, reference):
    data = [FORMS[form](ids) for ids in ROWS]
    report = secateur.finetune(models / "pruned", tmp_path / "out", data, steps=3, **{**QUICK, "learning_rate": 0.01})
    digest, tensors = reference
    assert report["plan"]["data"]["digest"] == digest
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_labels_from_a_file_and_another_plan_without_them(models, tmp_path, reference):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record(ids, 4)) for ids in ROWS))
    options = {**QUICK, "steps": 3, "learning_rate": 0.01}
    secateur.finetune(models / "pruned", tmp_path / "out", tmp_path / "rows.jsonl", **options)
    assert all(torch.equal(tensor, reference[1][name]) for name, tensor in tensors_of(tmp_path / "out").items())
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in ROWS))
    with pytest.raises(secateur.ResumeError, match="digest"):
        secateur.finetune(models / "pruned", tmp_path / "out", tmp_path / "rows.jsonl", **options)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_labels_do_not_disturb_pruning_on_the_way(method, models, tmp_path):
    data = [record(ids, 4) for ids in ROWS]
    report = secateur.finetune(
        models / "dense", tmp_path / "out", data, steps=2, sparsity=0.5, rounds=2, method=method, **QUICK
    )
    assert report["sparsity"] == 0.5


def test_labels_of_another_length_are_one_line_and_leave_nothing(models, tmp_path):
    data = [{"input_ids": ROWS[0], "labels": ROWS[0][:5]}]
    with pytest.raises(
        secateur.DataError, match="row 1: labels must have a value for each of its 12 token ids"
    ) as error:
        secateur.finetune(models / "pruned", tmp_path / "out", data, steps=1, **QUICK)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
