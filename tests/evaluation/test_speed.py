"""Timing models: what is run and how often, which numbers come of it, what is missing, and that nothing outlives it."""

import io
import json
import logging
import shutil
import subprocess
import sys
import types

import psutil
import pytest
import torch
from rich.console import Console

import secateur
from secateur import cli
from secateur.evaluation import speed, speed_worker
from secateur.reporting.terminal.tables import speed_table
from tiny import Interrupts, edit_json, save_tiny

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
}
SMALL = {"prompt": 6, "tokens": 4, "rounds": 2, "threads": 1}
DTYPE_SECONDS = {"float32": 2.0, "bfloat16": 1.0, "auto": 4.0}


@pytest.fixture(autouse=True)
def own_logging():
    """`main` sets up logging for a process of its own."""
    names = ("secateur", "datasets", "huggingface_hub", "transformers")
    former = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in names}
    yield
    for name, (handlers, level) in former.items():
        logging.getLogger(name).handlers, logging.getLogger(name).level = handlers, level
    logging.getLogger("secateur").propagate = True


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models(family)``: a tiny model, dense and packed, neither with a tokenizer; to be read only."""
    known = {}

    def made(family="llama"):
        if family not in known:
            folder = tmp_path_factory.mktemp("timed") / family
            save_tiny(folder / "dense", family, **FAMILIES[family])
            secateur.prune(folder / "dense", folder / "packed", method="magnitude", format="bitmask")
            known[family] = folder / "dense", folder / "packed"
        return known[family]

    return made


def processes():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


# A worker that loads nothing: it answers at once, as it is told to.

WORKER = """
import json, os, signal, sys
options = json.loads(next(word for word in sys.argv if word.startswith("{")))
orders, log = json.loads(sys.argv[-2]), sys.argv[-1]
orders = orders.get(options["directory"] + " " + options["dtype"], {})

def say(what):
    with open(log, "a") as file:
        file.write(json.dumps([options["dtype"], os.getpid(), what]) + "\\n")

def answer(line):
    print(line if isinstance(line, str) else json.dumps(line), flush=True)

say(options)
if orders.get("load") == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if orders.get("load"):
    answer(orders["load"])
    sys.exit()
answer({"resident_bytes": 1000, "dtype": orders.get("dtype", options["dtype"]), "arrangement": None})
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    say(request)
    if orders.get("die") == number:
        os.kill(os.getpid(), signal.SIGKILL)
    if orders.get("fail") == number:
        answer({"error": "MemoryError: no room"})
        break
    if orders.get("babble") == number:
        answer("what is no answer")
        break
    slow = 1000 if number < orders.get("warm", 1) else 1 + number % 3
    answer({"prefill": SECONDS[options["dtype"]] * slow, "decode": [9, SECONDS[options["dtype"]] * slow, 0.001]})
""".replace("SECONDS", repr(DTYPE_SECONDS))


class Workers:
    """What the workers are told, and what they were asked."""

    def __init__(self, folder):
        self.log, self.orders, self.started = folder / "asked.jsonl", {}, []
        self.script = folder / "worker.py"
        self.script.write_text(WORKER)

    def tell(self, directory, dtype, **orders):
        self.orders[f"{directory} {dtype}"] = orders

    def popen(self, command, **options):
        words = [sys.executable, "-S", "-E", str(self.script), *command[1:], json.dumps(self.orders), str(self.log)]
        self.started.append(subprocess.Popen(words, **options))
        return self.started[-1]

    @property
    def asked(self):
        """[dtype, pid, what] of every message, in order."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def gone(self):
        return all(process.poll() is not None for process in self.started) and not processes()


@pytest.fixture
def workers(tmp_path, monkeypatch):
    found = Workers(tmp_path)
    theirs = types.SimpleNamespace(PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL, Popen=found.popen)
    monkeypatch.setattr(speed, "subprocess", theirs)
    return found


def bench(model, **options):
    return secateur.bench(model, **{**SMALL, "record": False, **options})


def table(found):
    console = Console(file=io.StringIO(), width=200)
    console.print(speed_table(found))
    return console.file.getvalue()


def row(found, what):
    """The cells of a row of the table."""
    line = next((line for line in table(found).splitlines() if f" {what} " in line), None)
    return line and [cell.strip() for cell in line.split("│")[1:-1]][1:]


def sensible(speeds, batches):
    assert [one["batch"] for one in speeds] == list(batches)
    for one in speeds:
        assert set(one) == {"batch", "prefill", "decode"}
        for what in ("prefill", "decode"):
            assert set(one[what]) == {"median", "slowest", "fastest"}
            assert 0 < one[what]["slowest"] <= one[what]["median"] <= one[what]["fastest"]


# What is run, in which order, and what the numbers are.


def test_the_faster_dtype_of_a_dense_model_counts_and_the_other_is_kept(models, workers):
    found = bench(models()[0], batch=(1, 3), rounds=3)
    (model,) = found["models"]
    assert model["dtype"] == "bfloat16" and set(model["other_dtypes"]) == {"float32"} and model["not_measured"] == {}
    sensible(model["speeds"], (1, 3))
    assert model["speeds"][0]["decode"]["median"] == 2 * model["other_dtypes"]["float32"][0]["decode"]["median"]
    assert model["resident_bytes"] == 1000 and model["arrangement"] is None


def test_tokens_per_second_are_of_all_sequences_and_of_the_median_round(models, workers):
    """Requests 1 to 3 take 2, 3 and 1 seconds, the warm-up 1000."""
    (model,) = bench(models()[1], batch=(2,), prompt=5, rounds=3)["models"]
    assert model["speeds"] == [
        {
            "batch": 2,
            "prefill": {"median": 10 / 8, "slowest": 10 / 12, "fastest": 10 / 4},
            "decode": {"median": 2 / 8, "slowest": 2 / 9, "fastest": 2 / 4},
        }
    ]


def test_models_take_turns_and_the_warm_up_is_the_same_work(models, workers):
    dense, packed = models()
    bench(packed, against=dense, batch=(1, 4), rounds=2)
    loads, asked = workers.asked[:3], workers.asked[3:]
    assert [dtype for dtype, _, _ in loads] == ["auto", "float32", "bfloat16"]
    one_round = [(dtype, batch) for batch in (1, 4) for dtype in ("auto", "float32", "bfloat16")]
    assert [(dtype, what["batch"]) for dtype, _, what in asked] == 3 * one_round
    assert all((what["prompt"], what["tokens"]) == (6, 4) for _, _, what in asked)
    assert len({process for _, process, _ in asked}) == 3


def test_options_reach_the_worker(models, workers):
    bench(models()[1], threads=3, prefer="memory", activations="int8")
    options = workers.asked[0][2]
    assert (options["threads"], options["prefer"], options["activations"]) == (3, "memory", "int8")
    assert options["packed"] is True and options["trust_remote_code"] is False


def test_threads_are_torchs_unless_they_are_given(models, workers):
    assert bench(models()[1], threads=None)["threads"] == torch.get_num_threads()


def test_progress_ends_where_it_said_that_it_would(models, workers):
    seen = []

    class Listener:
        def start(self, task, total, done=0):
            seen.append(total)

        def advance(self, done=1, note=None):
            seen.append(-done)

        def finish(self):
            seen.append("finished")

    dense, packed = models()
    workers.tell(dense, "float32", load={"error": "no"})
    bench(packed, against=dense, batch=(1, 2), rounds=2, progress=Listener())
    assert seen.pop() == "finished" and sum(seen) == 0 and seen[0] == 3 * 2 * 2


# What is missing.


def test_a_dtype_that_cannot_be_loaded_is_not_measured_and_the_other_is(models, workers):
    dense = models()[0]
    for orders in ({"load": {"error": "ValueError: no"}}, {"load": "die"}):
        workers.tell(dense, "bfloat16", **orders)
        found = bench(dense)
        (model,) = found["models"]
        assert model["dtype"] == "float32" and set(model["not_measured"]) == {"bfloat16"}
        assert model["not_measured"]["bfloat16"] and model["other_dtypes"] == {}
        assert f"bfloat16 not measured: {model['not_measured']['bfloat16']}" in " ".join(table(found).split())


def test_a_model_that_cannot_be_loaded_at_all_is_an_error_and_nothing_is_timed(models, workers):
    dense, packed = models()
    for dtype in ("float32", "bfloat16"):
        workers.tell(dense, dtype, load={"error": "ValueError: no"})
    with pytest.raises(secateur.ModelError, match=r"dense: cannot be timed \(ValueError: no\)"):
        bench(packed, against=dense)
    assert len(workers.asked) == 3 and workers.gone


@pytest.mark.parametrize("how", ["die", "fail"])
@pytest.mark.parametrize("request_", [0, 1, 3])
def test_a_worker_that_dies_leaves_its_cells_out_and_the_rest_goes_on(how, request_, models, workers):
    """Requests are the warm-up of both batches, then both batches in each round."""
    dense, packed = models()
    workers.tell(dense, "bfloat16", **{how: request_})
    found = bench(packed, against=dense, batch=(1, 3))
    first, second = found["models"]
    sensible(first["speeds"], (1, 3))
    assert first["not_measured"] == {} and set(second["not_measured"]) == {"bfloat16"}
    asked = [what for dtype, _, what in workers.asked if dtype == "bfloat16"]
    assert len(asked) == 1 + request_ + 1 and workers.gone  # its options, and what it was asked
    assert len([1 for dtype, _, what in workers.asked if dtype == "auto" and "batch" in what]) == 6


def test_a_dtype_that_died_half_way_does_not_stand_for_the_model(models, workers):
    """The slower one has all its numbers."""
    dense = models()[0]
    workers.tell(dense, "bfloat16", die=3)
    (model,) = bench(dense, batch=(1, 3))["models"]
    assert model["dtype"] == "float32"
    sensible(model["speeds"], (1, 3))


@pytest.mark.parametrize("first", [True, False])
def test_a_cell_that_is_missing_says_so_whichever_model_it_is_of(first, models, workers):
    dense, packed = models()
    workers.tell(packed, "auto", die=3)
    found = bench(packed, against=dense, batch=(1, 3)) if first else bench(dense, against=packed, batch=(1, 3))
    cells = row(found, "decode, batch 3")
    assert cells[0 if first else 1] == "not measured" and "tokens/s" in cells[1 if first else 0] and cells[2] == ""
    assert "tokens/s" in row(found, "decode, batch 1")[0 if first else 1]


def test_a_packed_model_whose_worker_dies_before_any_number_is_an_error(models, workers):
    dense, packed = models()
    workers.tell(packed, "auto", die=0)
    with pytest.raises(secateur.ModelError, match="packed: cannot be timed"):
        bench(packed, against=dense)
    assert workers.gone


def test_an_answer_that_is_none_is_as_good_as_no_answer(models, workers):
    dense = models()[0]
    workers.tell(dense, "bfloat16", babble=2)
    (model,) = bench(dense)["models"]
    assert model["dtype"] == "float32" and set(model["not_measured"]) == {"bfloat16"} and workers.gone


def test_what_there_is_no_memory_for_is_not_measured_and_says_why(models, workers, monkeypatch):
    dense = models()[0]
    weights = sum(t["shape"][0] * t["shape"][1] for t in secateur.inspect(dense)["matrices"])
    monkeypatch.setattr(speed, "free_memory_bytes", lambda device: 3 * weights)
    found = bench(dense)
    (model,) = found["models"]
    assert model["dtype"] == "bfloat16" and len(workers.started) == 1
    assert "GB are free" in model["not_measured"]["float32"] and "not measured" in table(found)


def test_a_model_that_fits_in_no_dtype_is_an_error_and_nothing_is_started(models, workers, monkeypatch):
    monkeypatch.setattr(speed, "free_memory_bytes", lambda device: 100)
    for model in models():
        with pytest.raises(secateur.ModelError, match=r"cannot be timed \(takes about .* GB are free\)"):
            bench(model)
    assert workers.started == []


# Nothing outlives it.


def test_no_worker_is_left_when_it_is_done(models, workers):
    bench(models()[0])
    assert len(workers.started) == 2 and workers.gone


@pytest.mark.parametrize("step", [1, 4])
def test_an_interruption_leaves_no_worker_and_no_record(step, models, workers, tmp_path):
    packed = shutil.copytree(models()[1], tmp_path / "packed")
    with pytest.raises(KeyboardInterrupt):
        bench(packed, record=True, batch=(1, 2), progress=Interrupts(step, "timing"))
    assert workers.started and workers.gone and not (packed / "evaluations.jsonl").exists()


def test_an_interruption_while_a_worker_loads_leaves_none(models, workers, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed._Run, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(models()[0])
    assert len(workers.started) == 1 and workers.gone


LIGHT = """
import os, sys
from secateur.evaluation import speed_worker
def load(options):
    print("words of a model's code")
    os.write(1, b"words of a library\\n")
    return None, {"ready": True}
def generate(model, **request):
    os.write(1, b"more words")
    if request.get("fail"):
        raise RuntimeError("first line\\nsecond line")
    return request
speed_worker._load, speed_worker._generate = load, generate
speed_worker.main()
"""


@pytest.fixture
def light():
    """The real worker's talk, about no model."""
    command = [sys.executable, "-c", LIGHT, "{}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_worker_answers_line_by_line_whatever_else_is_printed(light):
    assert json.loads(light.stdout.readline()) == {"ready": True}
    light.stdin.write(b'{"batch": 1}\n')
    light.stdin.flush()
    assert json.loads(light.stdout.readline()) == {"batch": 1}


def test_a_worker_says_in_one_line_why_it_cannot(light):
    out, _ = light.communicate(b'{"fail": true}\n', timeout=60)
    assert json.loads(out.splitlines()[-1]) == {"error": "RuntimeError: first line"}


def test_a_worker_ends_when_nobody_asks_any_more(light):
    light.stdin.close()
    assert light.wait(timeout=60) == 0


# What cannot be measured.

REFUSED = {
    "tokens 1": {"tokens": 1},
    "rounds 0": {"rounds": 0},
    "prompt 0": {"prompt": 0},
    "threads 0": {"threads": 0},
    "threads -1": {"threads": -1},
    "batch": {"batch": (0,)},
    "batch:": {"batch": ()},
    "batch: ": {"batch": (4, -1)},
    "prompt 61": {"prompt": 61},
    "prefer 'fast'": {"prefer": "fast"},
    "activations 'int4'": {"activations": "int4"},
}


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("message", REFUSED)
def test_numbers_with_which_nothing_can_be_measured_are_refused_before_anything_is_loaded(
    message, kind, models, workers
):
    with pytest.raises(secateur.OptionError, match=message):
        bench(models()[kind == "packed"], **REFUSED[message])
    assert workers.started == []


def test_nothing_is_made_ready_for_numbers_with_which_nothing_can_be_measured(monkeypatch):
    """A GGUF file would be turned into a checkpoint, and a model of the hub downloaded."""
    monkeypatch.setattr("secateur.api.measuring.locate", lambda *_: pytest.fail("the model was looked for"))
    with pytest.raises(secateur.OptionError, match="rounds 0"):
        bench("smollm2", rounds=0)


@pytest.mark.parametrize("other", ["missing", "empty", "short"])
def test_nothing_is_loaded_before_both_models_can_be(other, models, workers, tmp_path):
    dense, packed = models()
    against = tmp_path / other
    if other == "empty":
        against.mkdir()
    if other == "short":
        shutil.copytree(dense, against)
        edit_json(against / "config.json", max_position_embeddings=9)
    with pytest.raises(secateur.SecateurError, match=other):
        bench(packed, against=against)
    assert workers.started == []


@pytest.mark.parametrize("words", [("--batch", "x"), ("--batch", ""), ("--batch", "1,"), ("--batch", "1.5")])
def test_a_batch_that_is_no_number_is_a_wrong_use_of_the_command(words, models, workers, capsys):
    assert cli.main(["bench", str(models()[0]), *words]) == 2
    captured = capsys.readouterr()
    assert "whole numbers, such as 1,8" in captured.err and captured.out == "" and workers.started == []


@pytest.mark.parametrize(
    "words", [("--batch", "0"), ("--rounds", "0"), ("--tokens", "1"), ("--prompt", "63"), ("--against", "./nothing")]
)
def test_the_command_says_in_one_line_what_it_cannot_measure(words, models, workers, capsys):
    assert cli.main(["bench", str(models()[0]), "--prompt", "4", "--tokens", "4", *words]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert workers.started == []


def test_ctrl_c_in_the_command(models, workers, monkeypatch, capsys):
    monkeypatch.setattr(cli.screen, "progress", lambda: Interrupts(2, "timing"))
    assert cli.main(["bench", str(models()[0]), "--prompt", "4", "--tokens", "4", "--no-record"]) == 130
    assert capsys.readouterr().err == "interrupted\n" and workers.gone


# The record and the table.


def test_it_is_recorded_beside_weights_of_ours_only(models, workers, tmp_path):
    dense, packed = (shutil.copytree(directory, tmp_path / directory.name) for directory in models())
    bench(packed)
    assert not (packed / "evaluations.jsonl").exists()
    found = [bench(packed, record=True) for _ in range(2)]
    bench(dense, against=packed, record=True)
    lines = [json.loads(line) for line in (packed / "evaluations.jsonl").read_text().splitlines()]
    assert [line["bench"] for line in lines] == json.loads(json.dumps(found))
    assert all(line["schema"] == 1 and line["date"] and line["software"] for line in lines)
    assert not (dense / "evaluations.jsonl").exists()


def document(**changes):
    speeds = [{"batch": 1} | {k: {"median": 20.0, "slowest": 1.0, "fastest": 300.0} for k in ("prefill", "decode")}]
    one = {
        "name": "one", "dtype": "float32", "bytes": 1500, "resident_bytes": 3000, "arrangement": None,
        "speeds": speeds, "other_dtypes": {}, "not_measured": {},
    }  # fmt: skip
    two = {**one, "name": "two", "bytes": 3000, "resident_bytes": 6000}
    conditions = {"processor": "a processor", "threads": 2, "prompt": 5, "tokens": 3, "rounds": 7, "software": {}}
    return {**conditions, "models": [{**one, **changes}, two]}


def test_the_table_has_each_number_and_the_first_models_ratio_to_the_second():
    found = document()
    assert row(found, "bytes on disk") == ["1.5 kB", "3.0 kB", "0.50"]
    assert row(found, "resident memory") == ["3.0 kB", "6.0 kB", "0.50"]
    assert row(found, "decode, batch 1") == ["20.0 tokens/s (1.0 to 300.0)"] * 2 + ["1.00"]
    text = " ".join(table(found).split())
    assert "a processor, 2 threads; 5 tokens of prompt, 3 new; median of 7 rounds" in text


def test_the_table_of_one_model_has_no_ratio():
    found = document()
    found["models"].pop()
    assert row(found, "bytes on disk") == ["1.5 kB"] and "ratio" not in table(found)


def test_the_table_says_how_a_packed_model_runs():
    arranged = {"kernels": "some", "packed": 3, "unpacked": 4, "dense_kernel": 1, "activations8": 2, "measured": []}
    text = " ".join(table(document(arrangement=arranged)).split())
    assert "one: 3 matrices run packed, 4 dense; some kernels; 2 with 8-bit activations" in text
    text = " ".join(table(document(arrangement={**arranged, "kernels": None, "activations8": 0})).split())
    assert "no kernels, torch computes" in text and "8-bit" not in text


def test_brackets_in_names_and_reasons_are_shown():
    text = table(document(name="models[v2]/[/one]", not_measured={"float32": "[Errno 12] no [/room]"}))
    assert text.count("models[v2]/[/one]") >= 2 and "[Errno 12] no [/room]" in text


def test_memory_that_did_not_grow_has_no_ratio():
    assert row(document(resident_bytes=0), "resident memory")[2] == ""


# Real models.


@pytest.fixture
def worker_here():
    """The worker's functions in this process, on its threads."""
    threads = torch.get_num_threads()
    yield lambda directory, **options: speed_worker._load(
        {
            "directory": str(directory), "packed": directory.name == "packed", "threads": 1, "prefer": None,
            "activations": None, "trust_remote_code": False, "dtype": "auto", **options,
        }
    )  # fmt: skip
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_worker_loads_and_times_every_kind_of_model(family, kind, models, worker_here):
    directory = models(family)[kind == "packed"]
    model, loaded = worker_here(directory)
    assert loaded["dtype"] == "float32" and isinstance(loaded["resident_bytes"], int) and not model.training
    assert json.loads(json.dumps(loaded)) == loaded
    assert (loaded["arrangement"] is None) == (kind == "dense")
    for batch, prompt, tokens in ((1, 1, 2), (3, 5, 4)):
        taken = speed_worker._generate(model, batch=batch, prompt=prompt, tokens=tokens)
        assert taken["prefill"] > 0 and len(taken["decode"]) == tokens - 1 and min(taken["decode"]) > 0


def test_a_worker_arranges_a_packed_model_as_it_is_asked_to(models, worker_here, monkeypatch):
    slow = {"rows": 1, "columns": 1, "kernel": 2.0, "torch": 1.0}
    monkeypatch.setattr("secateur.runtime.arrangement.measured", lambda *_: slow)
    monkeypatch.setenv("SECATEUR_PREFER", "speed")
    for prefer, unpacked in ((None, 21), ("speed", 21), ("memory", 0)):
        arranged = worker_here(models()[1], prefer=prefer)[1]["arrangement"]
        assert (arranged["unpacked"], arranged["packed"]) == (unpacked, 21 - unpacked)


def test_a_worker_runs_a_dense_model_in_the_dtype_asked_for(models, worker_here):
    for dtype in ("float32", "bfloat16"):
        assert worker_here(models()[0], dtype=dtype)[1]["dtype"] == dtype


def test_a_model_that_would_stop_early_is_run_to_the_end(models, worker_here):
    model, _ = worker_here(models()[0])
    with torch.no_grad():
        model.lm_head.weight[2] = 100 * model.model.norm.weight  # always the end of text
    model.generation_config.max_length = 7
    assert len(speed_worker._generate(model, batch=2, prompt=5, tokens=6)["decode"]) == 5


def test_a_packed_model_against_its_dense_one(models, tmp_path):
    """Three processes, with the real worker in them."""
    dense, packed = models()[0], shutil.copytree(models()[1], tmp_path / "packed")
    found = bench(packed, against=dense, batch=(1, 3), record=True)
    assert set(found) == {"processor", "threads", "prompt", "tokens", "rounds", "software", "models"}
    assert [found[key] for key in SMALL] == list(SMALL.values()) and processes() == []
    first, second = found["models"]
    assert (first["name"], second["name"]) == (str(packed), str(dense))
    for model, directory in ((first, packed), (second, dense)):
        assert set(model) == {
            "name", "dtype", "bytes", "resident_bytes", "arrangement", "speeds", "other_dtypes", "not_measured"
        }  # fmt: skip
        assert model["bytes"] == secateur.inspect(directory)["bytes"] and model["not_measured"] == {}
        assert model["resident_bytes"] > model["bytes"] / 2
        sensible(model["speeds"], (1, 3))
    assert first["dtype"] == "float32" and first["other_dtypes"] == {} and second["arrangement"] is None
    assert {second["dtype"], *second["other_dtypes"]} == {"float32", "bfloat16"}
    assert (first["arrangement"]["packed"], first["arrangement"]["unpacked"]) == (21, 0)  # the tests prefer memory
    (line,) = (packed / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["bench"] == found


def test_the_command_prints_one_document(models, tmp_path, capsys):
    packed = shutil.copytree(models()[1], tmp_path / "packed")
    words = ["--prompt", "4", "--tokens", "3", "--rounds", "1", "--threads", "1", "--no-record", "--json"]
    assert cli.main(["bench", str(packed), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and [m["name"] for m in found["models"]] == [str(packed)]
    assert (found["prompt"], found["tokens"], found["rounds"], found["threads"]) == (4, 3, 1, 1)
    sensible(found["models"][0]["speeds"], (1,))
    assert not (packed / "evaluations.jsonl").exists() and processes() == []


def test_python_files_beside_a_model_do_not_run(models, tmp_path, monkeypatch):
    """Not even when the command is given in the model's own directory."""
    model = shutil.copytree(models()[1], tmp_path / "model")
    for name in ("psutil", "json", "torch", "secateur"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(model)
    monkeypatch.setattr(sys, "path", [word for word in sys.path if word not in ("", ".")])
    with pytest.raises(secateur.ModelError, match="int8"):  # which is known when it has been loaded
        bench(".", activations="int8")
    assert not (tmp_path / "run").exists()
