"""What people who come from the Wanda and SparseGPT scripts type, and the command they are given for it."""

import doctest
import shlex
import subprocess
import sys

import pytest

from secateur import coming_from
from secateur.coming_from import translate

WANDA = "python main.py --model meta-llama/Llama-2-7b-hf --prune_method wanda --sparsity_ratio 0.5"
LLAMA = "python llama.py meta-llama/Llama-2-7b-hf c4"


def command(typed: str) -> str:
    message = translate(shlex.split(typed))
    assert message is not None
    assert "\n" not in message
    return message.partition(" In Secateur: secateur prune ")[2]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            f"{WANDA} --sparsity_type unstructured --nsamples 128 --seed 0 --save out/wanda",
            "meta-llama/Llama-2-7b-hf out/wanda --method wanda --sparsity 0.5 --samples 128 --seed 0",
        ),
        (f"{WANDA} --save log --save_model out", "meta-llama/Llama-2-7b-hf out --method wanda --sparsity 0.5"),
        (f"{WANDA} --sparsity_type 2:4", "meta-llama/Llama-2-7b-hf OUTPUT --method wanda --pattern 2:4"),
        (f"{WANDA} --sparsity_type=4:8", "meta-llama/Llama-2-7b-hf OUTPUT --method wanda --pattern 4:8"),
        ("--prune_method=sparsegpt --model=m", "m OUTPUT --method sparsegpt"),
        ("prune --prune-method magnitude --sparsity-ratio .6", "MODEL OUTPUT --method magnitude --sparsity .6"),
        ("--model m --prune_method ablate_wanda_seq --save o", "m o --method sparsegpt"),
        ("--model 'my model' --save \"it's\"", "'my model' 'it'\"'\"'s'"),
        (
            f"{LLAMA} --sparsity .5 --save out --seed 1",
            "meta-llama/Llama-2-7b-hf out --method sparsegpt --sparsity .5 --calibration c4 --seed 1",
        ),
        (
            "llama.py m wikitext2 --prunen 2 --prunem 4",
            "m OUTPUT --method sparsegpt --pattern 2:4 --calibration wikitext2",
        ),
        ("m c4 --prunen 1 --prunem 4", "m OUTPUT --method sparsegpt --pattern 3:4 --calibration c4"),
        ("m c4 --sparsity .5 --prunen=3 --prunem=4", "m OUTPUT --method sparsegpt --pattern 1:4 --calibration c4"),
        ("m c4 --sparsity .5 --prunen 0 --prunem 0", "m OUTPUT --method sparsegpt --sparsity .5 --calibration c4"),
        ("m c4 --sparsity .5 --gmp", "m OUTPUT --method magnitude --sparsity .5 --calibration c4"),
        ("m ptb --gmp", "m OUTPUT --method magnitude"),
        ("m c4 --percdamp .01 --blocksize 128", "m OUTPUT --method sparsegpt --calibration c4"),
        ("m out --percdamp .02 --blocksize=64", "m out --method sparsegpt:damping=.02:block_size=64"),
        ("m out --gmp --percdamp .1", "m out --method magnitude"),
        ("m out --minlayer -1 --maxlayer 1000 --wbits 16", "m out --method sparsegpt"),
        ("m out --prune_only mlp", "m out --method sparsegpt --include mlp"),
        ("m out --prune_only q.k --invert", "m out --method sparsegpt --exclude 'q\\.k'"),
        ("prune m out --nsamples 64", "m out --samples 64"),
        ("prune m out --method ria --sparsity .6 --nsamples 9", "m out --method ria --sparsity .6 --samples 9"),
        (
            "prune m out --overwrite --device cuda --include=up --include down --sparsity_ratio 0.5",
            "m out --sparsity 0.5 --overwrite --device cuda --include up --include down",
        ),
        ("-v prune --debug m out --nsamples 9", "m out --samples 9 -v --debug"),
        ("--nsamples", "MODEL OUTPUT --samples VALUE"),
        ("m out --percdamp 1..2", "m out --method sparsegpt:damping=1..2"),
        ("m out --true-sequential --nsamples 9", "m out --method sparsegpt --samples 9 --propagate sequential"),
    ],
)
def test_the_equal_command_is_given(typed: str, expected: str) -> None:
    assert command(typed) == expected


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (f"{WANDA} --use_variant", "--use_variant (under wanda all rows get the same sparsity)"),
        (f"{WANDA} --cache_dir weights", "--cache_dir (set the environment variable HF_HOME)"),
        (f"{WANDA} --eval_zero_shot", "--eval_zero_shot (pruning runs no tasks)"),
        ("--prune_method ablate_mag_iter", "--prune_method ablate_mag_iter ("),
        (f"{LLAMA} --wbits 4", "--wbits (pruning does not quantise)"),
        (f"{LLAMA} --minlayer 3", "--minlayer (choose matrices by --include or --exclude)"),
        (f"{LLAMA} --maxlayer 3 --invert", "--invert (choose matrices by --include or --exclude)"),
        (f"{LLAMA} --log_wandb", "--log_wandb ("),
        (f"{LLAMA} --gmp --percdamp 1", "--percdamp (an option of sparsegpt)"),
        ("m ptb --prunen 1 --prunem 2", "ptb (give the text itself as --calibration FILE)"),
        ("m c4 --prunen 1 --prunem 4", "1 pruned of 4; Secateur writes what is kept, 3:4"),
        ("m c4 --prunen 1 --prunem 4 --sparsity .5", "sparsity .5 (3:4 is a sparsity of 0.25)"),
    ],
)
def test_what_has_no_equal_is_named(typed: str, said: str) -> None:
    message = translate(shlex.split(typed))
    assert message is not None
    assert said in message.partition("Not carried over: ")[2]


@pytest.mark.parametrize(
    ("typed", "whose"),
    [
        (WANDA, "--model, --prune_method, --sparsity_ratio: flags of locuslab/wanda."),
        (f"{LLAMA} --gmp", "--gmp: flags of IST-DASLab/sparsegpt."),
        ("--nsamples 3", "--nsamples: flags of locuslab/wanda and IST-DASLab/sparsegpt."),
    ],
)
def test_nothing_is_lost_in_silence_and_nothing_named_that_is_carried(typed: str, whose: str) -> None:
    message = translate(shlex.split(typed))
    assert message is not None
    assert message.startswith(f"{whose} In Secateur: ")


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "prune m out",
        "prune m out --sparsity 0.5 --seed 1 --method sparsegpt:damping=0.02",
        "m c4 --sparsity .5",
        "prune m out --smaples 3",
        "eval m --nsamples 3",
        "--quiet eval m --nsamples 3",
    ],
)
def test_without_a_foreign_flag_there_is_nothing_to_say(typed: str) -> None:
    assert translate(shlex.split(typed)) is None


def test_every_foreign_flag_can_stand_alone() -> None:
    for flag in coming_from.FLAGS:
        for arguments in ([flag], [flag, "x"], [f"{flag}="]):
            assert translate(arguments)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(coming_from).failed == 0


def test_it_loads_without_the_libraries() -> None:
    code = "import sys, secateur.coming_from; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
