"""What the terminal says of a pruned model, and of a dry run."""

from rich.console import Console

from report_data import a_pruning
from secateur.reporting.terminal.tables import plan_table, prune_table

ESTIMATE = {"seconds": 90.0, "memory_bytes": 1e6, "disk_bytes": 1e6}
OUTLOOK = {"estimate": ESTIMATE, "matrices": 4, "weights": 64, "mean_sparsity": 0.5}


def printed(table):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines()], capture.get()


def test_what_a_pruning_did_beside_its_method(refined):
    lines, text = printed(prune_table(refined))
    assert "tiny: wanda+swaps+pcg:iterations=5 (preset best), row, 50% removed" in text
    said = "mean sparsity 50.00%; of 3 slopes, 0.1 changes predictions least"
    assert ["allocation", "", "linear", said] in lines
    assert ["error of a block", "0.3750", "0.1875", "held out, mean over 2 blocks that were reconstructed"] in lines


def test_a_dry_run_says_what_would_be_done(refined):
    lines, _ = printed(plan_table({**refined["plan"], **OUTLOOK}))
    assert ["method", "wanda+swaps+pcg:iterations=5 (preset best), pattern row, propagate block"] in lines
    assert ["allocation", "linear, mean sparsity 50.00%; of 3 slopes, 0.1 changes predictions least"] in lines
    assert ["reconstruction", "at most 8 epochs for each block, learning rate 0.002"] in lines


def test_an_older_report_says_no_more_than_it_knows():
    report = a_pruning()
    text = printed(prune_table(report))[1] + printed(plan_table({**report["plan"], **OUTLOOK}))[1]
    assert "tiny: sparsegpt, row" in text
    assert not any(word in text for word in ("preset", "allocation", "error", "reconstruction"))


def test_a_method_is_no_markup_in_a_terminal(refined):
    refined["plan"]["method"] = "[/b]own"
    assert "[/b]own (preset best)" in printed(prune_table(refined))[1]
    assert "[/b]own (preset best)" in printed(plan_table({**refined["plan"], **OUTLOOK}))[1]
