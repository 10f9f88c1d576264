"""Thousands of damaged and lying files: each is refused in one line, or what is read from it is sound.

Every mutation comes of a seeded generator, so that a failure is the same everywhere; its message holds the file.
"""

import json
import math
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from secateur.errors import ModelError
from secateur.models.checkpoint import INDEX, Checkpoint
from secateur.models.shards import DTYPES, read_header, read_tensor, tensor_entry, write_safetensors
from secateur.models.source import open_checkpoint
from tiny import bytes_of, tiny_config

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.é": torch.arange(4).to(torch.bfloat16),
    "n": torch.tensor(7),
    "e": torch.empty(0, 3, dtype=torch.float16),
    "u": torch.arange(5, dtype=torch.uint8),
}
VALID = save(TENSORS, {"format": "pt"})

# Written in place of a value, as JSON text: what no serialiser would write is among them.
DEEP = 100_000
NUMBERS = [str(n) for n in (0, 1, 2, 3, 4, 6, 8, 24, 40, -1, -4, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**70)]
NUMBERS += ["-0", "4.0", "0.5", "1e2", "1e999", "-1e999", "NaN", "Infinity", "9" * 4300, "9" * 5000, "-" + "9" * 4300]
WORDS = ['""', '"a"', '"F32"', '"F64"', '"BF16"', '"I8"', '"U8"', '"BOOL"', '"F8_E4M3"', '"f32"', '"U128"', '"\\ud800"']
WORDS += ['"\\u0000"', '"a\\nb"', '"\U0001f333\u202e"', '"' + "x" * 300 + '"', '"__metadata__"', '"\\ud83c\\udf33"']
OTHERS = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[0]",
    "[1]",
    "[2,3]",
    "[3,2]",
    "[6]",
    "[1,6,1]",
    "[[1]]",
    '{"a":1}',
    "[0,4]",
]
OTHERS += ["[0,0]", "[4,0]", f"[0,{2**62}]", f"[0,{2**63}]", f"[0,{2**40},{2**40}]", f"[{2**40},{2**40},0]"]
OTHERS += [f"[{2**32},{2**32}]", "[" + "1," * 300 + "1]", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP]
VALUES = NUMBERS + WORDS + OTHERS
LENGTHS = [0, 1, 2, 7, 8, 2**16, 100 << 20, (100 << 20) + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


class Text(str):
    """JSON text that is written as it is."""


def dump(tree):
    """JSON text of a tree of dicts (or lists of pairs, where keys come twice), lists, values and `Text`."""
    if isinstance(tree, Text):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ",".join(f"{k if isinstance(k, Text) else json.dumps(k)}:{dump(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, tuple):  # pairs
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return json.dumps(tree, ensure_ascii=False)


def places(tree):
    """Every (container, key) in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inner):
        yield tree, key
        yield from places(value)


def mutate_tree(rng, tree):
    """Change one place of a tree: its value, its key, its presence; or swap two."""
    container, key = rng.choice(list(places(tree)))
    kind = rng.randrange(8)
    if kind < 3:
        container[key] = Text(rng.choice(VALUES))
    elif kind == 3 and isinstance(container[key], int):
        container[key] += rng.choice([-4, -1, 1, 2, 4, 8, 2**32, 2**64])
    elif kind == 4:
        del container[key]
    elif kind == 5:
        other, place = rng.choice(list(places(tree)))
        container[key], other[place] = json.loads(json.dumps(other[place], default=str)), container[key]
    elif kind == 6 and isinstance(container, dict):
        container[Text(rng.choice(WORDS))] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, Text(rng.choice(VALUES)))
    else:
        container[rng.choice(["x", "dtype", "shape", "data_offsets", "a", "__metadata__"])] = Text(rng.choice(VALUES))
    return tree


def mutate_bytes(rng, data):
    """Flip a bit, put in bytes, take some out, or cut the end off; mostly where the header is."""
    data = bytearray(data)
    if not data:
        return rng.randbytes(4)
    at = rng.randrange(min(len(data), rng.choice([8, 9, 400, 10**9])))
    kind = rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.choice(b'{}[]",:0129-.e\\\x00 \x7f\xff')
    elif kind == 2:
        data[at:at] = rng.choice([rng.randbytes(rng.randrange(1, 9)), data[at : at + 9], b"0", b" ", b"\xef\xbb\xbf"])
    elif kind == 3:
        del data[at : at + rng.choice([1, 1, 2, 8, 40])]
    else:
        del data[at:]
    return bytes(data)


def put(path, data):
    """Write a file anew: to truncate one and write it again is slow on some file systems, which then flush it."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# One safetensors file.


def split(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def packed(text, data, length=None):
    text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def header_mutant(rng):
    """A header with one or two lies in its table; its length is right."""
    text, data = split(VALID)
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2])):
        mutate_tree(rng, tree)
    return packed(dump(tree), data)


def shape_mutant(rng):
    """Tables that may well be sound: shapes, dtypes and spans drawn anew, mostly of sizes that fit."""
    entries, begin = [], 0
    for name in rng.sample(["a", "b", "c", "ü", "", "a/../b"], rng.randrange(4)):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice([0, 1, 1, 2, 3]) for _ in range(rng.randrange(4))]
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        if rng.random() < 0.1:
            shape.append(rng.choice([0, 1, 2, 2**40, 2**62]))
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
        begin = end
    if entries and rng.random() < 0.3:
        entries.append((entries[0][0], rng.choice(entries)[1]))  # a key that comes twice
    if rng.random() < 0.3:
        entries.append(("__metadata__", rng.choice([{}, {"a": "b"}, {"a": 1}, None, [], "x"])))
    rng.shuffle(entries)
    text = dump(tuple(entries))
    spaces = rng.choice(["", " ", "\n" * 7, "\t", "\0"])
    return packed(rng.choice([text + spaces, spaces + text]), rng.randbytes(begin + rng.choice([0, 0, 0, 1, -1]) % 99))


def byte_mutant(rng):
    data = VALID
    for _ in range(rng.choice([1, 1, 2, 5])):
        data = mutate_bytes(rng, data)
    return data


def text_mutant(rng):
    """A header with damaged text, or in another encoding, whose length is right; or a length that lies."""
    text, data = split(VALID)
    kind = rng.randrange(8)
    if kind == 0:
        return packed(text.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"])), data)
    if kind == 1:
        return packed(text, data, rng.choice([*LENGTHS, len(text) - 8, len(text) + 1, len(text) + len(data)]))
    if kind == 2:
        return packed(rng.choice(VALUES), rng.choice([b"", data]))
    return packed(mutate_bytes(rng, text), data)


def check_file(path):
    """Refused in one line, or sound and the same as the library reads; returns whether it was accepted."""
    data = path.read_bytes()
    text, _ = split(data)
    try:
        infos, metadata = read_header(path)
    except ModelError as error:
        said, infos = str(error), None
    if infos is None:
        assert "\n" not in said and said.encode() and len(said) < 2000
    else:
        assert all(isinstance(text, str) for text in (*metadata, *metadata.values()))
        start = 8 + len(text)
        spans = sorted((info.begin, info.end) for info in infos.values())
        assert [b for b, _ in spans] + [len(data)] == [start] + [e for _, e in spans]  # no gap, no overlap, no rest
        for name, info in infos.items():
            tensor = read_tensor(info)
            name.encode()  # can be printed
            assert info.path == path
            assert tensor.dtype == info.dtype and tuple(tensor.shape) == info.shape
            assert bytes_of(tensor) == data[info.begin : info.end]
    theirs = by_the_library(path)
    if theirs is not None and infos is not None:
        assert {name: (info.dtype, info.shape) for name, info in infos.items()} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in theirs.items()
        }
        assert all(bytes_of(tensor) == bytes_of(read_tensor(infos[name])) for name, tensor in theirs.items())
    elif theirs is not None:  # we refuse more: other dtypes, metadata that is null, shapes beyond any memory
        assert (
            any(tensor.dtype not in DTYPES.values() for tensor in theirs.values())
            or b"null" in text
            or any(math.prod(max(n, 1) for n in tensor.shape) >= 2**60 for tensor in theirs.values())
        ), said
    return infos is not None


def by_the_library(path):
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, RuntimeError, ValueError, OSError):  # TypeError: a shape that torch cannot hold
        return None


@pytest.mark.parametrize(
    ("mutant", "cases", "accepted"),
    [(header_mutant, 4000, 300), (shape_mutant, 3000, 1000), (byte_mutant, 4000, 50), (text_mutant, 2000, 20)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_files(tmp_path, mutant, cases, accepted):
    path, found = tmp_path / "model.safetensors", 0
    for case in range(cases):
        data = mutant(random.Random(f"{mutant.__name__} {case}"))
        put(path, data)
        try:
            found += check_file(path)
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {str(error)[:300]}; {data[:600]!r}") from error
    assert found >= accepted  # soundness was asked of these


# An index and its shards.

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = ["../x.safetensors", "/etc/passwd", "..", ".", "", "sub", "sub/y.safetensors", "..\\\\x", "a\\u0000b", "a\\nb"]
FILES += [
    "x" * 300,
    "\\ud800",
    "config.json",
    "extra.safetensors",
    "model.safetensors",
    SHARDS[0],
    SHARDS[1],
    "~",
    "%2e%2e",
]


@pytest.fixture
def two_shards(tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    tensors = list(TENSORS.items())
    for name, part in zip([*SHARDS, "extra.safetensors"], (tensors[:2], tensors[2:], tensors[1:3]), strict=True):
        write_safetensors(directory / name, [tensor_entry(*pair) for pair in part])
    for outside in (tmp_path / "x.safetensors", directory / "sub" / "y.safetensors"):
        write_safetensors(outside, [tensor_entry("outside", torch.ones(3))])
    return directory


def index_mutant(rng, text):
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, text)
    tree = json.loads(text)
    if kind == 1:
        mutate_tree(rng, tree)
    else:
        for name in rng.sample(sorted(tree["weight_map"]), rng.choice([1, 1, 2])):
            tree["weight_map"][rng.choice([name, name, "../z"])] = Text(f'"{rng.choice(FILES)}"')
    return dump(tree).encode("utf-8", "surrogatepass")


def test_damaged_indices(two_shards):
    weight_map = {name: SHARDS[n >= 2] for n, name in enumerate(TENSORS)}
    text, found = json.dumps({"metadata": {"total_size": 69}, "weight_map": weight_map}).encode(), 0
    for case in range(3000):
        rng = random.Random(f"index {case}")
        data = index_mutant(rng, text)
        put(two_shards / INDEX, data)
        try:
            checkpoint = Checkpoint.open(two_shards)
        except ModelError as error:
            said, checkpoint = str(error), None
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {str(error)[:300]}; {data[:600]!r}") from error
        if checkpoint is None:
            assert "\n" not in said and said.encode(), f"case {case}: {said!r}"
            continue
        found += 1
        for name, info in checkpoint.tensors.items():
            assert info.path.parent == two_shards and ".." not in info.path.name and name != "outside"
            assert torch.equal(checkpoint.read(name), TENSORS[name])
    assert found >= 100


@pytest.mark.parametrize("kind", ["index", "shard"])
def test_a_directory_in_place_of_a_file(two_shards, kind):
    if kind == "index":
        (two_shards / INDEX).mkdir()
    else:
        (two_shards / INDEX).write_text('{"weight_map": {"a": "sub"}}')
    with pytest.raises(ModelError):
        Checkpoint.open(two_shards)


# A config. (No huge num_labels: transformers itself makes a table of as many names.)

CONFIG_KEYS = ["quantization_config", "text_config", "decoder", "text_encoder", "generator", "model_type", "auto_map"]
CONFIG_KEYS += ["is_encoder_decoder", "architectures", "num_hidden_layers", "layer_types", "rope_scaling", "dtype"]
CONFIG_KEYS += ["vision_config", "rope_parameters", "id2label", "problem_type", "transformers_version", "torch_dtype"]
CONFIG_VALUES = ['"gpt2"', '"t5"', '"bert"', '{"quant_method":"awq"}', '{"model_type":"llama"}', '["full_attention"]']
CONFIG_VALUES += ['{"AutoConfig":"code.Config"}', '"float16"', '{"rope_type":"yarn","factor":-1}']


def config_mutant(rng, text):
    if rng.random() < 0.25:
        return mutate_bytes(rng, text)
    tree = json.loads(text)
    if rng.random() < 0.5:
        mutate_tree(rng, tree)
    else:
        for key in rng.sample(CONFIG_KEYS, rng.choice([1, 1, 2])):
            tree[key] = Text(rng.choice(CONFIG_VALUES + VALUES))
    return dump(tree).encode("utf-8", "surrogatepass")


@pytest.fixture
def questions(monkeypatch):
    """What was asked of whoever sits at the keyboard."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    return asked


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_damaged_configs(tmp_path, questions, family):
    write_safetensors(tmp_path / "model.safetensors", [tensor_entry(*pair) for pair in TENSORS.items()])
    text, found = tiny_config(family).to_json_string(use_diff=False).encode(), 0
    for case in range(400):
        data = config_mutant(random.Random(f"{family} {case}"), text)
        put(tmp_path / "config.json", data)
        try:
            checkpoint = open_checkpoint(tmp_path)
        except ModelError as error:
            said, checkpoint = str(error), None
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {str(error)[:300]}; {data[:600]!r}") from error
        if checkpoint is None:
            assert "\n" not in said and len(said) < 2000, f"case {case}: {said!r}"
            continue
        found += 1
        assert checkpoint.tensors.keys() == TENSORS.keys()
    assert found >= 50 and not questions
