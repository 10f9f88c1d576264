"""What the terminal says of a training."""

import pytest
from rich.console import Console

from report_data import a_course, a_training
from secateur.reporting.terminal.training import training_table


def changed(**changes):
    report = a_training()
    return {**report, "plan": {**report["plan"], **changes}}


def printed(table):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()], " ".join(text.split())


def test_the_table_of_a_terminal_has_what_was_recorded():
    lines, text = printed(training_table(a_training()))
    assert "thin: trained for 6 steps (lora), every zero was kept" in text
    for line in (
        ["perplexity", "50.00", "30.00", "wiki, 4 windows of 8 tokens, 32 of 99 tokens"],
        ["held-out loss", "5.000", "4.000", "nats per token, 2 rows held out"],
        ["sparsity", "50.00%", "50.00%", "of 64 weights"],
        ["checkpoint", "1.0 kB", "750 B", "0.75 of the 16-bit dense checkpoint"],
        ["trained", "", "1,200", "parameters, learning rate 0.001"],
        ["data", "", "20", "rows, 160 tokens of c4"],
        ["time", "", "20 s", "2 threads, cpu"],
        ["peak memory", "", "2.0 MB", "of the whole process"],
    ):
        assert line in lines
    assert "The model is that of step 6 of 8, whose loss on held-out rows was lowest." in text
    assert "Try" not in text and "teacher" not in text and "packed" not in text


def test_the_table_of_a_terminal_says_no_more_than_was_done():
    report = {**a_training(), "evaluation": None}
    report["training"] |= {"steps": 8, "held_out": [[0, 5.0], [8, 4.0]]}
    text = printed(training_table(report))[1]
    assert "perplexity" not in text and "The model is that" not in text


def test_a_course_a_teacher_and_packing_are_told():
    report = changed(course=a_course(), teacher={"name": "big", "digest": "d"}, train="full")
    report |= {"sparsity": 0.6, "packed": {"matrices": 4, "dense": 128, "predicted": 72, "true": 74}}
    report["training"] |= {"loss": "divergence"}
    lines, text = printed(training_table(report))
    assert "pruned on the way to 60.0% by wanda gradually from 25.0%, with a new mask every 2 steps" in text
    assert ["divergence from the teacher", "5.000", "4.000", "nats per token, 2 rows held out"] in lines
    assert ["teacher", "", "", "big"] in lines
    packed = ["packed matrices", "128 B", "74 B", "4 packed: 0.5781 of their dense bytes, 0.5625 predicted"]
    assert packed in lines
    assert "by wanda in 3 rounds" in printed(training_table(changed(course=a_course(rounds=3))))[1]


@pytest.mark.parametrize(
    ("training", "said", "tried"),
    [
        ({"stopped": 7}, "The loss became NaN or infinite in step 7; the model is that of step 6 of 8.", True),
        ({"held_out": [[0, 4.0], [6, 4.5]]},
         "Training did not lower the loss on held-out rows: 4.000 before, 4.500 now.", True),
        ({"held_out": [[0, 4.0], [6, float("inf")]]}, "4.000 before, no number now.", True),
        ({"held_out": [], "held_out_rows": 0}, "nothing tells whether training did harm.", False),
    ],
)  # fmt: skip
def test_what_went_wrong_is_said(training, said, tried):
    report = a_training()
    report["training"] |= training
    text = printed(training_table(report))[1]
    assert said in text and ("Try a lower --learning-rate than 0.001, or more text." in text) == tried


def test_a_loss_that_rises_while_pruning_is_no_fault():
    report = changed(course=a_course(), train="full")
    report["training"] |= {"steps": 8, "held_out": [[0, 4.0], [8, 5.0]]}
    text = printed(training_table(report))[1]
    assert "did not lower" not in text and "Try" not in text


def test_names_are_no_markup_in_a_terminal():
    report = changed(model={"name": "[/a]", "digest": "d"}, course=a_course(method="[/b]", schedule="[/c]"))
    report["plan"] |= {"teacher": {"name": "[/d]"}, "train": "[/e]"}
    report["plan"]["data"]["source"] = "[/f]"
    text = printed(training_table(report))[1]
    assert all(f"[/{letter}]" in text for letter in "abcdef")
