"""What the terminal says of a shrunk model, and of a dry run."""

from rich.console import Console

from report_data import a_shrinking
from secateur.reporting.terminal.shrinking import outlook_table, shrink_table


def changed(**changes):
    report = a_shrinking()
    return {**report, "plan": {**report["plan"], **changes}}


def printed(table):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines()], capture.get()


def test_the_table_of_a_terminal_has_what_was_recorded():
    lines, text = printed(shrink_table(a_shrinking()))
    assert "tiny: 25.0% of its blocks' parameters removed, by obs" in text
    for line in (
        ["perplexity", "20.00", "50.00", "wiki, 4 windows of 8 tokens, 32 of 99 tokens"],
        ["parameters", "2,000", "1,600", "20.0% removed"],
        ["parameters of blocks", "1,600", "1,200", "25.0% removed"],
        ["intermediate_size", "1536", "1152", "config.json"],
        ["head_dim", "not said", "8", "config.json"],
        ["checkpoint", "4.0 kB", "6.4 kB", "1.60 of it in 16 bits before"],
        ["blocks removed", "", "2", "chosen by kl"],
        ["calibration", "", "", "4 sequences, 32 tokens of c4"],
        ["time to shrink", "", "10 s", "2 threads, cpu"],
        ["peak memory", "", "2.0 MB", "of the whole process"],
    ):
        assert line in lines
    assert not any(line and line[0] == "layer_types" for line in lines)  # too long for a table


def test_the_table_of_a_terminal_says_no_more_than_was_done():
    report = {**changed(layers=[2], compensate=False, calibration=None), "evaluation": None}
    lines, text = printed(shrink_table(report))
    assert "by obs without compensation" in text and ["blocks removed", "", "2", "as asked"] in lines
    assert "perplexity" not in text and "calibration" not in text
    assert "by obs" not in printed(shrink_table({**report, "matrices": []}))[1]


def test_names_are_no_markup_in_a_terminal():
    hostile = {"[/red]": ["[/x]", "[/y]"]}
    report = {**changed(model={"name": "[/b]a", "digest": "d"}), "config": hostile}
    assert "[/b]a" in printed(shrink_table(report))[1] and "[/x]" in printed(shrink_table(report))[1]
    plan = {**report["plan"], "config": hostile, "candidates": ["[/z]"]}
    assert all(word in printed(outlook_table(plan))[1] for word in ("[/b]a", "[/x] becomes [/y]", "[/z]"))


def test_the_outlook_names_what_will_be_tried():
    plan = {**a_shrinking()["plan"], "config": {"intermediate_size": [48, 24]}, "candidates": ["half", "a third"]}
    text = printed(outlook_table(plan))[1]
    assert "tiny: nothing is written (dry run)" in text and "48 becomes 24" in text
    assert "half" in text and "a third" in text and "32 tokens of c4" in text
