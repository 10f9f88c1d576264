"""Our reader and writer of safetensors against the safetensors library, and against files that lie."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError, OutputError
from secateur.models.checkpoint import INDEX, Checkpoint, index_of
from secateur.models.shards import (
    DTYPES,
    WEIGHTS,
    copied_entry,
    digest,
    read_header,
    read_tensor,
    tensor_entry,
    write_safetensors,
)
from tiny import bytes_of, same_bytes, tensors_of

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (0, 3)]


def values(dtype, shape):
    g = torch.Generator().manual_seed(3)
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) > 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=g).to(dtype)
    return torch.randint(0, 120, shape, generator=g).to(dtype)


def all_kinds():
    return {
        f"{kind}.{'x'.join(map(str, shape)) or 'scalar'}": values(dtype, shape)
        for kind, dtype in DTYPES.items()
        for shape in SHAPES
    }


def write(path, tensors, metadata=None):
    write_safetensors(path, [tensor_entry(name, tensor) for name, tensor in tensors.items()], metadata)
    return path


def read(path):
    return {name: read_tensor(info) for name, info in read_header(path)[0].items()}


def test_the_library_reads_what_we_write(tmp_path):
    tensors = all_kinds()
    tensors["strided"] = values(torch.float32, (6, 4)).T
    tensors["part"] = values(torch.bfloat16, (6, 4))[1:4, 2:]
    found = load_file(write(tmp_path / "a.safetensors", tensors))
    assert same_bytes(found, {name: tensor.contiguous() for name, tensor in tensors.items()})


def test_we_read_what_the_library_writes(tmp_path):
    tensors = all_kinds()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "ü"})
    assert same_bytes(read(tmp_path / "a.safetensors"), tensors)
    assert read_header(tmp_path / "a.safetensors")[1] == {"format": "pt", "x": "ü"}


def test_special_bits_survive(tmp_path):
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    odd.view(torch.int32)[2] = 0x7FC12345
    assert bytes_of(load_file(write(tmp_path / "a.safetensors", {"odd": odd}))["odd"]) == bytes_of(odd)
    assert bytes_of(read(tmp_path / "a.safetensors")["odd"]) == bytes_of(odd)


def test_what_is_read_can_be_written_to(tmp_path):
    write(tmp_path / "a.safetensors", {"a": torch.ones(3), "b": torch.ones(3)})
    a = read(tmp_path / "a.safetensors")["a"]
    a.zero_()
    assert read(tmp_path / "a.safetensors")["a"].sum() == 3


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "who": "é\n"}])
def test_metadata_is_written(tmp_path, metadata):
    write(tmp_path / "a.safetensors", {"a": torch.ones(3)}, metadata)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == (metadata or {"format": "pt"})


def test_data_is_aligned(tmp_path):
    for count in range(1, 9):
        path = write(tmp_path / "a.safetensors", {"a" * count: torch.ones(2)})
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_no_tensors_at_all(tmp_path):
    assert load_file(write(tmp_path / "a.safetensors", {})) == {} == read(tmp_path / "a.safetensors")


def test_copies_are_the_same_bytes(tmp_path):
    tensors = all_kinds()
    infos, _ = read_header(write(tmp_path / "a.safetensors", tensors))
    write_safetensors(tmp_path / "b.safetensors", [copied_entry(name, info) for name, info in infos.items()])
    assert same_bytes(load_file(tmp_path / "b.safetensors"), tensors)


def test_copies_cast_floats_only(tmp_path):
    tensors = all_kinds()
    infos, _ = read_header(write(tmp_path / "a.safetensors", tensors))
    entries = [copied_entry(name, info, torch.float16) for name, info in infos.items()]
    write_safetensors(tmp_path / "b.safetensors", entries)
    expected = {n: t.to(torch.float16) if t.dtype in WEIGHTS else t for n, t in tensors.items()}
    assert same_bytes(load_file(tmp_path / "b.safetensors"), expected)


def header(table, data=b"", *, raw=None, length=None):
    text = raw if raw is not None else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = entry(0, 4, [1])
HOSTILE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "only a length": (2).to_bytes(8, "little"),
    "header cut off": header({"a": ONE}, length=4000),
    "header of 2^63 bytes": header({"a": ONE}, b"1234", length=2**63),
    "header of no bytes": header({}, raw=b"", length=0),
    "data cut off": header({"a": ONE}, b"123"),
    "data left over": header({"a": ONE}, b"12345"),
    "not JSON": header(None, raw=b"{'a': 1}"),
    "not text": header(None, raw=b"{\xff\xfe}"),
    "a list": header([1, 2]),
    "entry is a list": header({"a": [1]}),
    "entry is a number": header({"a": 7}),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "unknown dtype": header({"a": entry(0, 4, [1], "F33")}, b"1234"),
    "dtype is a list": header({"a": entry(0, 4, [1], ["F32"])}, b"1234"),
    "shape too large": header({"a": entry(0, 4, [2])}, b"1234"),
    "shape too small": header({"a": entry(0, 8, [1])}, b"12345678"),
    "negative shape": header({"a": entry(0, 4, [-1, -1])}, b"1234"),
    "shape that overflows": header({"a": entry(0, 4, [2**62, 4, 2**62])}, b"1234"),
    "shape is infinite": header(None, b"1234", raw=b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'),
    "one offset": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, b"1234"),
    "three offsets": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
    "end before begin": header({"a": entry(4, 0, [1])}, b"1234"),
    "begins before the data": header({"a": entry(-4, 0, [1])}, b"1234"),
    "ends after the data": header({"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}, b"1234"),
    "overlap": header({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, b"123456"),
    "the same bytes twice": header({"a": ONE, "b": ONE}, b"1234"),
    "gap": header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1234567890ab"),
    "gap at the start": header({"a": entry(4, 8, [1])}, b"12345678"),
    "deeply nested": header(None, raw=b"[" * 100_000),
    "metadata is a list": header({"__metadata__": [1]}),
    "fraction in a shape": header({"a": entry(0, 4, [1.5])}, b"1234"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_lies_is_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ["az", "za"])
def test_an_empty_tensor_may_share_its_place(tmp_path, order):
    table = {"a": entry(0, 4, [1]), "z": entry(0, 0, [0])}
    path = tmp_path / "a.safetensors"
    path.write_bytes(header({name: table[name] for name in order}, b"1234"))
    expected = load_file(path)
    assert same_bytes(read(path), expected)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    infos, _ = read_header(write(tmp_path / "a.safetensors", {"a": torch.ones(100)}))
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(ModelError, match=r"a\.safetensors"):
        read_tensor(infos["a"])
    with pytest.raises(ModelError, match=r"a\.safetensors"):
        list(copied_entry("a", infos["a"]).pieces())


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_shards(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert same_bytes({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors_of(sharded))
    index = json.loads((sharded / INDEX).read_text())
    shards = checkpoint.shards()
    assert len(shards) >= 3
    assert {name: shard for shard, names in shards.items() for name in names} == index["weight_map"]
    assert [file.name for file in checkpoint.files] == ["config.json", *sorted(shards)]
    sizes = {s: [(n, len(bytes_of(checkpoint.read(n)))) for n in names] for s, names in shards.items()}
    again = json.loads(index_of(sizes))
    assert again["weight_map"] == index["weight_map"]
    assert again["metadata"]["total_size"] == index["metadata"]["total_size"] == checkpoint.bytes


def test_digest_sees_every_byte_and_the_order(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").write_bytes(b"y" * 100)
    heard = []
    first = digest([tmp_path / "a", tmp_path / "b"], heard.append)
    assert sum(heard) == 200
    assert digest([tmp_path / "b", tmp_path / "a"]) != first
    (tmp_path / "b").write_bytes(b"y" * 99 + b"z")
    assert digest([tmp_path / "a", tmp_path / "b"]) != first


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "..", ".", "", "a\0b", 7, None, ["a"]]
)
def test_an_index_may_name_no_file_elsewhere(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    write(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\x00"])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match="index"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("file", "said"), [("pytorch_model.bin", "pickle"), ("notes.txt", "no safetensors")])
def test_other_weights_are_not_opened(tmp_path, file, said):
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=said) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)
