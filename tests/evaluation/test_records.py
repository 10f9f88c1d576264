"""Evaluations are kept beside the weights that they measure, and nowhere else."""

import json

import secateur


def test_an_evaluation_is_noted_in_our_own_directories_only(model_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small, clean and made just above a bud. " * 20)
    source, ours = model_directory("llama"), tmp_path / "ours"
    secateur.prune(source, ours, method="magnitude")
    found = [secateur.evaluate(ours, text=str(text), seqlen=16, windows=n) for n in (2, 3)]
    secateur.evaluate(ours, text=str(text), seqlen=16, windows=1, record=False)
    secateur.evaluate(source, text=str(text), seqlen=16, windows=1)
    lines = [json.loads(line) for line in (ours / "evaluations.jsonl").read_text().splitlines()]
    assert [line["windows"] for line in lines] == [2, 3]
    assert all(line[key] == value for line, one in zip(lines, found, strict=True) for key, value in one.items())
    assert not (source / "evaluations.jsonl").exists()
