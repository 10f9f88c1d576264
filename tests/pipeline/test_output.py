"""OUTPUT: what may lie there already, what is replaced, and what is never touched."""

import shutil

import pytest
import torch

import secateur
from dying_runs import result
from secateur.errors import DataError, OptionError, OutputError, SecateurError
from secateur.pipeline.run_directory import RunDirectory
from tiny import files_below, rows, same_bytes, tensors_of

ROWS = [torch.arange(3, 3 + n) for n in (24, 24, 17, 17, 17)]


def test_two_processes_do_not_share_an_output(model, out):
    first = RunDirectory(out)
    with pytest.raises(OutputError, match="another process"):
        secateur.prune(model, out, method="magnitude")
    first.close()
    secateur.prune(model, out, method="magnitude")


def test_a_finished_output_is_left_as_it_is(model, out, messages):
    first = secateur.prune(model, out, calibration=ROWS)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    messages.clear()
    again = secateur.prune(model, out, calibration=ROWS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert again.report == first.report and again.path == out
    assert len([m for m in messages if "nothing to do" in m]) == 1
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_finished_output_of_another_plan_is_refused_or_replaced(model, out):
    secateur.prune(model, out, calibration=ROWS)
    before = files_below(out)
    with pytest.raises(OutputError, match=r"sparsity 0\.5, not 0\.25.*--overwrite"):
        secateur.prune(model, out, calibration=ROWS, sparsity=0.25)
    assert files_below(out.parent) == {f"out/{name}": data for name, data in before.items()}
    secateur.prune(model, out, calibration=ROWS, sparsity=0.25, overwrite=True)
    secateur.prune(model, out.with_name("fresh"), calibration=ROWS, sparsity=0.25)
    assert result(out) == result(out.with_name("fresh"))
    assert sorted(p.name for p in out.parent.iterdir()) == ["fresh", "out"]


METHOD_PAIRS = [
    (secateur.METHODS["wanda"], secateur.METHODS["ria"]),
    (secateur.parse_method("sparsegpt:damping=0.01"), secateur.parse_method("sparsegpt:damping=0.5")),
]


@pytest.mark.parametrize("methods", METHOD_PAIRS, ids=["wanda, ria", "damping"])
def test_other_methods_are_other_plans_when_given_as_objects(model, out, methods):
    for method in methods:
        secateur.prune(model, out.with_name("fresh"), method=method, pattern="row", calibration=ROWS, overwrite=True)
        try:
            secateur.prune(model, out, method=method, pattern="row", calibration=ROWS)
        except OutputError as error:
            assert "method" in str(error)  # noqa: PT017
        else:
            assert same_bytes(tensors_of(out), tensors_of(out.with_name("fresh")))


def test_the_order_of_rules_is_part_of_the_plan(model, out):
    """The first rule that matches wins, so another order is another result."""
    rules = {".*q_proj": 0.25, ".*": 0.75}
    secateur.prune(model, out, method="magnitude", allocation=rules)
    with pytest.raises(OutputError, match="allocation"):
        secateur.prune(model, out, method="magnitude", allocation=dict(reversed(rules.items())))


FOREIGN = {"thesis.tex": "years of work", "words.json": "not JSON", "list.json": "[]", "table.json": '{"mine": 1}'}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [*FOREIGN, "a file", "the model", "its parent", "a link to it"])
def test_an_occupied_output_is_refused(tmp_path, model, out, kind, overwrite):
    source = tmp_path / "models" / "m"
    secateur.prune(model, source, method="magnitude")  # itself one of ours, and so is what it lies in
    shutil.copy(source / "secateur.json", source.parent)
    if kind in FOREIGN:
        out.mkdir()
        (out / ("secateur.json" if kind.endswith("json") else kind)).write_text(FOREIGN[kind])
    elif kind == "a file":
        out.write_text("a file")
    elif kind == "a link to it":
        out.symlink_to(source)
    target = {"the model": source, "its parent": source.parent}.get(kind, out)
    before = files_below(tmp_path)
    with pytest.raises(OutputError) as caught:
        secateur.prune(source, target, method="magnitude", overwrite=overwrite)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    assert files_below(tmp_path) == before


def test_a_foreign_directory_in_the_run_directorys_place_is_kept(model, out):
    foreign = out.with_name("out.secateur")
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for options in ({}, {"resume": False}, {"calibration": [], "method": "wanda"}):
        try:
            secateur.prune(model, out, **{"method": "magnitude", "overwrite": True, **options})
        except SecateurError as error:
            assert "\n" not in str(error)  # noqa: PT017
        assert (foreign / "notes.txt").exists()


@pytest.mark.parametrize("where", ["empty", "empty/", "new/deep/er"])
def test_an_empty_or_new_directory_is_accepted(tmp_path, model, monkeypatch, where):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    secateur.prune(model, where, method="magnitude")
    assert (tmp_path / where / "secateur.json").exists()


@pytest.mark.parametrize("where", [".", "", "..", "/"])
def test_directories_without_a_name_of_their_own(tmp_path, model, monkeypatch, where):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    try:
        secateur.prune(model, where, method="magnitude")
    except SecateurError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert list((tmp_path / "empty").iterdir()) == []
    else:
        assert (tmp_path / "empty" / "secateur.json").exists()


FAILURES = [
    ({"calibration": []}, DataError),
    ({"calibration": "no such file"}, DataError),
    ({"calibration": torch.full((2, 5), 1000)}, DataError),
    ({"include": "nothing like it"}, OptionError),
    ({"allocation": {"17": 0.5}}, OptionError),
    ({"samples": 0}, OptionError),
    ({"device": "abacus"}, OptionError),
    ({"evaluate": "no such file"}, DataError),
    ({"method": "sparsegpt:damping=-1"}, OptionError),
]


@pytest.mark.parametrize(("options", "error"), FAILURES, ids=lambda value: str(value)[:40])
def test_a_run_that_fails_before_its_first_block_leaves_nothing(model, out, options, error):
    with pytest.raises(error):
        secateur.prune(model, out, **{"calibration": rows(), **options})
    assert list(out.parent.iterdir()) == []
