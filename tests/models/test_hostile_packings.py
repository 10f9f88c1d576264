"""Packed checkpoints that lie are refused in one line, or read to the very numbers that were packed."""

import copy
import json
import random
import shutil
import zlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import ModelError
from secateur.models.checkpoint import Checkpoint
from secateur.models.formats import check, checksum, pack
from tiny import bytes_of, edit_json, rows, tiny_model

WEIGHTS = "model.safetensors"
IDS = rows(1, 8)
KINDS = {"bitmask": ("bitmask", None), "nm": ("nm", None), "int8": ("bitmask", "int8")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """``packed(kind)``: the directory of a small packed llama of one block, its tensors, and what they read as."""
    known = {}

    def made(kind="bitmask"):
        if kind not in known:
            folder = tmp_path_factory.mktemp("packed")
            model = tiny_model("llama", "bfloat16", num_hidden_layers=1)
            g = torch.Generator().manual_seed(0)
            for module in model.model.modules():
                if isinstance(module, nn.Linear):
                    order = torch.rand(module.weight.shape, generator=g).unflatten(-1, (-1, 4)).argsort(-1).argsort(-1)
                    module.weight.data.masked_fill_(order.flatten(-2) < 2, 0)
            model.save_pretrained(folder / "dense")
            format, values = KINDS[kind]
            secateur.pack(folder / "dense", folder / "packed", format=format, values=values)
            checkpoint = Checkpoint.open(folder / "packed")
            known[kind] = folder / "packed", load_file(folder / "packed" / WEIGHTS), everything(checkpoint)
        return known[kind]

    return made


def everything(checkpoint):
    """Every tensor as it is read: dtype, shape and bytes."""
    return {n: (t.dtype, tuple(t.shape), bytes_of(t)) for n in checkpoint.tensors for t in [checkpoint.read(n)]}


def entries(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]["matrices"]


def copied(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def set_entries(directory, matrices, **others):
    found = {"quant_method": "secateur", "version": 1, "matrices": matrices, **others}
    edit_json(directory / "config.json", quantization_config=found)


def refused_or_the_same(directory, expected, what):
    """Whether it was refused; anything but that and the very same numbers is a failure."""
    try:
        found = everything(Checkpoint.open(directory))
    except ModelError as error:
        assert "\n" not in str(error), what  # noqa: PT017
        return True
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert found == expected, what
    return False


# Bytes.


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_of_the_data(kind, packed, tmp_path):
    """Of parts, that is: nothing guards the bits of dense tensors."""
    source, tensors, expected = packed(kind)
    directory = copied(source, tmp_path / "model")
    data = (source / WEIGHTS).read_bytes()
    infos = Checkpoint.open(source).packed
    places = [(part.begin, part.end) for info in infos.values() for part in info.parts.values()]
    chance = random.Random(1)
    for _ in range(400):
        begin, end = chance.choice(places)
        where, bit = chance.randrange(begin, end), chance.randrange(8)
        flipped = bytearray(data)
        flipped[where] ^= 1 << bit
        (directory / WEIGHTS).write_bytes(flipped)
        assert refused_or_the_same(directory, expected, (where, bit))


def test_flipped_bits_of_the_header(packed, tmp_path):
    source, _, expected = packed()
    directory = copied(source, tmp_path / "model")
    data = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    chance = random.Random(2)
    guarded = set(entries(source))  # a flip may give a dense tensor another name, or floats of another kind
    for _ in range(400):
        where, bit = chance.randrange(8 + length), chance.randrange(8)
        flipped = bytearray(data)
        flipped[where] ^= 1 << bit
        (directory / WEIGHTS).write_bytes(flipped)
        try:
            found = everything(Checkpoint.open(directory))
        except ModelError:
            continue
        for name in guarded:
            assert found[name] == expected[name], (where, bit)


def test_truncation(packed, tmp_path):
    source, _, expected = packed()
    directory = copied(source, tmp_path / "model")
    data = (source / WEIGHTS).read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        (directory / WEIGHTS).write_bytes(data[:length])
        assert refused_or_the_same(directory, expected, length)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_missing_swapped_or_otherwise(kind, packed, tmp_path):
    source, tensors, expected = packed(kind)
    directory = copied(source, tmp_path / "model")
    parts = [n for n in tensors if any(n == m or n.startswith(f"{m}_") for m in entries(source))]
    chance = random.Random(3)
    for _ in range(250):
        changed, name = dict(tensors), chance.choice(parts)
        what = chance.choice(["missing", "swapped", "longer", "shorter", "dtype", "2-D", "reordered", "renamed"])
        if what == "missing":
            del changed[name]
        elif what == "swapped":
            other = chance.choice(parts)
            changed[name], changed[other] = changed[other].clone(), changed[name].clone()
        elif what in ("longer", "shorter"):
            changed[name] = torch.cat([changed[name], changed[name][:1]]) if what == "longer" else changed[name][:-1]
            changed[name] = changed[name].clone()
        elif what == "dtype":
            kinds = [torch.float32, torch.float16, torch.int8, torch.uint8, torch.bfloat16, torch.int64]
            changed[name] = changed[name].to(chance.choice(kinds))
        elif what == "2-D":
            changed[name] = changed[name][None].clone()
        elif what == "reordered":
            changed[name] = changed[name].flip(0)
        else:
            changed[f"{name}x"] = changed.pop(name)
        save_file(changed, directory / WEIGHTS)
        refused_or_the_same(directory, expected, (what, name))


# What config.json says.

ODD = [
    0, 1, -1, 2, 3, 7, 64, 2**31, 2**60, 2**63, 2**64, -(2**60), 10**30, 0.5, 1e300, float("inf"), float("nan"), True,
    False, None, "", "1", "bitmask", "nm", "int8", "float32", "float16", "bfloat16", "float64", "\x00", [], [1], [1, 2],
    [2**60, 2**60], [-32, -32], [32, 32.0], ["32", "32"], [32, 32, 1], [0, 64], [64, 0], {}, {"a": 1}, [[32], [32]],
]  # fmt: skip
KEYS = ["format", "shape", "dtype", "values", "count", "crc32", "n", "m"]


def lie(chance, entry):
    """Change one or two keys of an entry, remove one, or add one."""
    entry, what = dict(entry), []
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice(KEYS)
        how = chance.choice(["odd", "odd", "near", "gone", "unknown"])
        if how == "gone":
            entry.pop(key, None)
        elif how == "unknown":
            entry[chance.choice(["x", "self", "", "parts", "bytes"])] = chance.choice(ODD)
        elif how == "near" and type(entry.get(key)) is int:
            entry[key] += chance.choice([-64, -4, -1, 1, 4, 64])
        elif how == "near" and isinstance(entry.get(key), list):
            entry[key] = [n + chance.choice([-64, -4, -1, 0, 1, 4, 64]) for n in entry[key]]
        else:
            entry[key] = chance.choice(ODD)
        what.append((key, how))
    return entry, what


def claims(entry):
    """What an entry says of the numbers: a shape and a dtype that the model, not the file, can contradict."""
    return {key: entry.get(key) for key in ("shape", "dtype")}


@pytest.mark.parametrize("kind", ["bitmask", "nm", "int8"])
def test_entries_that_lie(kind, packed, tmp_path):
    source, _, expected = packed(kind)
    directory, truth = copied(source, tmp_path / "model"), entries(source)
    chance, refused = random.Random(4), 0
    for _ in range(700):
        matrices, name = copy.deepcopy(truth), chance.choice(list(truth))
        matrices[name], what = lie(chance, matrices[name])
        set_entries(directory, matrices)
        wanted = dict(expected)
        told = matrices[name].get("shape")
        if told != truth[name]["shape"] and isinstance(told, list) and len(told) == 2:
            # Only the model knows its shapes: a shape that fits the parts must still be the one that is read.
            try:
                found = everything(Checkpoint.open(directory))
            except ModelError:
                refused += 1
                continue
            assert found[name][1] == tuple(told), what
            wanted[name] = found[name]
        refused += refused_or_the_same(directory, wanted, (name, what, matrices[name]))
    assert refused > 350


@pytest.mark.parametrize("entry", [None, 1, "bitmask", [], {}, [["format", "bitmask"]], True])
def test_entries_that_are_none(entry, packed, tmp_path):
    source, _, expected = packed()
    directory, matrices = copied(source, tmp_path / "model"), entries(source)
    matrices[min(matrices)] = entry
    set_entries(directory, matrices)
    assert refused_or_the_same(directory, expected, entry)


@pytest.mark.parametrize("matrices", [None, [], "all", 7, True, ["a"]])
def test_matrices_that_are_none(matrices, packed, tmp_path):
    directory = copied(packed()[0], tmp_path / "model")
    set_entries(directory, matrices)
    with pytest.raises(ModelError, match=str(directory)):
        Checkpoint.open(directory)


@pytest.mark.parametrize("version", [2, 99, 0, -1, "1", None, 1.5, [1], {}])
def test_a_later_version_is_refused(version, packed, tmp_path):
    directory = copied(packed()[0], tmp_path / "model")
    set_entries(directory, entries(directory), version=version)
    with pytest.raises(ModelError, match="install a newer Secateur"):
        Checkpoint.open(directory)
    with pytest.raises(ModelError, match="install a newer Secateur"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("odd", [["secateur"], "secateur", 7, True, [{}]])
def test_a_quantization_config_that_is_none(odd, packed, tmp_path):
    directory = copied(packed()[0], tmp_path / "model")
    edit_json(directory / "config.json", quantization_config=odd)
    with pytest.raises(ModelError):
        secateur.inspect(directory)
    Checkpoint.open(directory)  # as one that is not packed: its own tensors, under their own names


def test_matrices_that_are_not_in_the_file(packed, tmp_path):
    source, _, expected = packed()
    directory, matrices = copied(source, tmp_path / "model"), entries(source)
    for name in (
        "x",
        "",
        "lm_head.weight",
        "model.norm.weight",
        "../x.weight",
        "model.layers.0.mlp.up_proj.weight_mask",
    ):
        set_entries(directory, {**matrices, name: next(iter(matrices.values()))})
        assert refused_or_the_same(directory, expected, name)


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_that_belongs_to_two_matrices(order, tmp_path):
    """Here the scales of one are the values of the other."""
    W = torch.zeros(40, 64)
    W[:, 0] = 1
    packing, parts = pack("a.weight", W, "bitmask", "int8")
    scale = torch.zeros(40, 64)
    scale[:, 0] = parts["_scale"]
    other, others = pack("a.weight_scale", scale, "bitmask")
    assert torch.equal(others[""], parts["_scale"])
    tensors = {f"a.weight{suffix}": part for suffix, part in parts.items()}
    save_file({**tensors, "a.weight_scale_mask": others["_mask"]}, tmp_path / WEIGHTS)
    both = [("a.weight", packing.to_json()), ("a.weight_scale", other.to_json())][::order]
    (tmp_path / "config.json").write_text("{}")
    set_entries(tmp_path, dict(both))
    with pytest.raises(ModelError, match=r"a\.weight_scale"):
        everything(Checkpoint.open(tmp_path))


# Parts that agree with their checksum, and are unsound all the same.


def forged(packed, tmp_path, kind, change):
    """A copy in which the parts of one matrix, and if need be its entry, were changed by somebody who can count."""
    source, tensors, _ = packed(kind)
    directory, matrices = copied(source, tmp_path / "model"), entries(source)
    name = "model.layers.0.mlp.up_proj.weight"  # [48, 32]: its tiles are half empty
    changed, entry = {n: t.clone() for n, t in tensors.items()}, matrices[name]
    parts = {n.removeprefix(name): changed[n] for n in changed if n.startswith(name)}
    change(parts, entry)
    order = [s for s in ("", "_mask", "_index", "_scale") if s in parts]
    entry["crc32"] = zlib.crc32(b"".join(bytes_of(parts[s]) for s in order))
    save_file({**changed, **{name + s: parts[s].contiguous() for s in order}}, directory / WEIGHTS)
    set_entries(directory, matrices)
    return directory, name


def in_the_padding(parts, entry):
    mask = parts["_mask"]
    mask[4] |= 1  # column 32 of 32
    parts[""] = torch.cat([parts[""], parts[""][:1]])
    entry["count"] += 1


def one_more(parts, entry):
    parts[""] = torch.cat([parts[""], parts[""][:1]])
    entry["count"] += 1


def one_less(parts, entry):
    parts["_mask"][0] &= ~(1 << (int(parts["_mask"][0]).bit_length() - 1))


def in_the_padding_moved(parts, entry):
    one_less(parts, entry)
    parts["_mask"][4] |= 1


def descending(parts, entry):
    byte = int(parts["_index"][0])
    parts["_index"][0] = (byte & ~15) | (byte >> 2 & 3) | (byte & 3) << 2


def twice(parts, entry):
    byte = int(parts["_index"][0])
    parts["_index"][0] = (byte & ~15) | (byte & 3) * 5


def beyond(parts, entry):
    """Indices of 3: the pattern is said to be 2 of 3, of which 33 columns have as many groups as 32 of 4 have."""
    entry.update(n=2, m=3, shape=[48, 24])
    parts["_index"][:] = 0b11011101


FORGED = {
    "bits in the padding": ("bitmask", in_the_padding),
    "a bit moved into the padding": ("bitmask", in_the_padding_moved),
    "a value more than bits": ("bitmask", one_more),
    "a bit less than values": ("bitmask", one_less),
    "bits in the padding, rounded": ("int8", in_the_padding),
    "indices that descend": ("nm", descending),
    "an index twice": ("nm", twice),
    "indices beyond the group": ("nm", beyond),
}


@pytest.mark.parametrize("kind", FORGED)
def test_unsound_parts_with_a_sound_checksum(kind, packed, tmp_path):
    directory, name = forged(packed, tmp_path, *FORGED[kind])
    with pytest.raises(ModelError) as caught:
        everything(Checkpoint.open(directory))
    assert str(caught.value).startswith(name) and "checksum" not in str(caught.value)
    with pytest.raises(ModelError):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("byte", [8 * 5 - 4, 8 * 5 + 1, 8 * 7])
def test_bits_below_and_beside_the_last_rows(byte):
    """The tile of rows 4 to 7 of a matrix of 6 rows and 40 columns."""
    W = torch.zeros(6, 40)
    W[:, 0] = 1
    packing, parts = pack("w", W, "bitmask")
    parts["_mask"][byte] |= 128
    parts[""] = torch.cat([parts[""], parts[""][:1]])
    packing = replace(packing, count=packing.count + 1, crc32=checksum(parts))
    inside = byte % 8 < 5 and byte // 8 < 6
    if inside:
        check("w", packing, parts)
    else:
        with pytest.raises(ModelError, match="beyond its edges"):
            check("w", packing, parts)


def test_forging_nothing_changes_nothing(packed, tmp_path):
    for kind in KINDS:
        directory, _ = forged(packed, tmp_path, kind, lambda parts, entry: None)
        assert not refused_or_the_same(directory, packed(kind)[2], kind)


# from_pretrained.


def logits(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_refuses_or_computes_the_same(kind, packed, tmp_path):
    source, tensors, _ = packed(kind)
    directory, truth, expected = copied(source, tmp_path / "model"), entries(source), logits(source)
    data = (source / WEIGHTS).read_bytes()
    infos = Checkpoint.open(source).packed
    places = [(part.begin, part.end) for info in infos.values() for part in info.parts.values()]
    chance, refused = random.Random(5), 0
    for number in range(16):
        directory = copied(source, directory)
        if number % 2:
            matrices, name = copy.deepcopy(truth), chance.choice(list(truth))
            matrices[name], what = lie(chance, matrices[name])
            set_entries(directory, matrices)
        else:
            what, flipped = chance.randrange(*chance.choice(places)), bytearray(data)
            flipped[what] ^= 1 << chance.randrange(8)
            (directory / WEIGHTS).write_bytes(flipped)
        try:
            found = logits(directory)
        except ModelError:
            refused += 1
            continue
        assert torch.equal(found, expected), what
    assert refused >= 10


GONE = ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("how", ["missing", "longer", "flat", "transposed"])
def test_dense_tensors_that_are_missing_or_of_another_shape_are_named(name, how, packed, tmp_path):
    source, tensors, _ = packed()
    directory, changed = copied(source, tmp_path / "model"), dict(tensors)
    tensor = changed.pop(name)
    if how == "longer":
        changed[name] = torch.cat([tensor, tensor[:1]])
    elif how == "flat":
        changed[name] = tensor.flatten() if tensor.ndim == 2 else tensor[None].clone()
    elif how == "transposed":
        changed[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[:-1].clone()
    save_file(changed, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_packed_matrix_whose_entry_is_gone(packed, tmp_path):
    directory = copied(packed()[0], tmp_path / "model")
    matrices = entries(directory)
    name = max(matrices)
    del matrices[name]
    set_entries(directory, matrices)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ModelError):
        secateur.inspect(directory)


def test_without_its_entries_it_does_not_open(packed, tmp_path):
    directory = copied(packed()[0], tmp_path / "model")
    edit_json(directory / "config.json", quantization_config=None)
    with pytest.raises((ModelError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(ModelError):
        secateur.inspect(directory)


@pytest.mark.parametrize("kind", ["nm", "bitmask"])
def test_a_matrix_that_is_said_to_lie_transposed(kind, packed, tmp_path):
    """The model knows better: a Linear is never transposed."""
    directory, matrices = copied(packed(kind)[0], tmp_path / "model"), entries(packed(kind)[0])
    name = "model.layers.0.self_attn.q_proj.weight"  # [32, 32]
    matrices[name]["transposed"] = True
    set_entries(directory, matrices)
    with pytest.raises(ModelError, match="q_proj"):
        secateur.inspect(directory)
    with pytest.raises(ModelError, match="q_proj"):
        AutoModelForCausalLM.from_pretrained(directory)
