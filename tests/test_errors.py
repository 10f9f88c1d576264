"""Whatever is wrong with a model is told in one line that names it, and nothing is written."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

import secateur
from families import FAMILIES
from secateur.errors import ModelError, NumericsError, SecateurError, nearest
from tiny import edit_json, rows, save_tiny, tensors_of, tiny_config

UP = "model.layers.1.mlp.up_proj.weight"


def llama(place):
    return save_tiny(place / "model", "llama")


def config(**changes):
    def make(place):
        edit_json(llama(place) / "config.json", **changes)

    return make


def config_text(text):
    def make(place):
        (llama(place) / "config.json").write_text(text)

    return make


def tensors(change):
    def make(place):
        found = tensors_of(llama(place))
        change(found)
        save_file(found, place / "model" / "model.safetensors", metadata={"format": "pt"})

    return make


def fill(name, value):
    def change(found):
        found[name][3, 5] = value

    return tensors(change)


def other_kind(kind, **settings):
    """A model that is no decoder, or none that can be pruned: its config, and some weights."""

    def make(place):
        tiny_config(kind, **settings).save_pretrained(place / "model")
        save_file({"a": torch.ones(2)}, place / "model" / "model.safetensors")

    return make


def llama4(place):
    save_tiny(place / "model", "llama4_text", **FAMILIES["llama4_text"])


def gemma3n(place):
    kinds = ["sliding_attention", "full_attention"] * 2
    settings = {"num_hidden_layers": 4, "head_dim": 8, "layer_types": kinds, "num_kv_shared_layers": 2}
    settings |= {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    settings |= {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4}
    save_tiny(place / "model", "gemma3n_text", **settings)


def only(*files):
    """A directory with a config and these files."""

    def make(place):
        llama(place)
        (place / "model" / "model.safetensors").unlink()
        for name, content in files:
            (place / "model" / name).write_bytes(content)

    return make


def nothing(place):
    pass


def an_empty_directory(place):
    (place / "model").mkdir()


def a_file(place):
    (place / "model").write_text("no model")


def no_config(place):
    (llama(place) / "config.json").unlink()


def gguf(content):
    def make(place):
        (place / "model.gguf").write_bytes(content)

    return make


HEADER = b"GGUF\x03\x00\x00\x00"
HOSTILE = {
    "nonexistent path": (nothing, "no such"),
    "empty directory": (an_empty_directory, "no config.json"),
    "a file": (a_file, "a model is a directory"),
    "no config": (no_config, "no config.json"),
    "config is not JSON": (config_text("{"), "config.json"),
    "config is a list": (config_text("[]"), "config.json"),
    "config is empty": (config_text("{}"), "config.json"),
    "config of an unknown type": (config(model_type="nonesuch"), "nonesuch"),
    "config with a word for a number": (config(hidden_size="wide"), "hidden_size"),
    "config without heads": (config(num_attention_heads=0), "config.json"),
    "config of more blocks than there are": (config(num_hidden_layers=4), r"no model\.layers\.3"),
    "config of another width": (config(intermediate_size=64), "shape"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .*gptq"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "quantised .*fp8"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}), "quantised"),
    "encoder": (other_kind("bert"), "bert|decoder"),
    "encoder and decoder": (other_kind("t5"), "t5 is not a decoder"),
    "vision and language": (other_kind("llava"), "llava wraps"),
    "fused experts": (llama4, r"experts.*layout is unknown"),
    "hidden states of another shape": (gemma3n, "."),
    "no weights": (only(), "no safetensors weights"),
    "only pickle": (only(("pytorch_model.bin", b"\x80\x04.")), "pickle"),
    "only pickle, in shards": (only(("pytorch_model-00001-of-00002.bin", b"\x80\x04.")), "pickle"),
    "only TensorFlow": (only(("tf_model.h5", b"")), "no safetensors weights"),
    "weights cut off": (only(("model.safetensors", b"\x10\0\0\0\0\0\0\0{")), "model.safetensors"),
    "missing tensor": (tensors(lambda t: t.pop(UP)), re.escape(UP)),
    "missing embedding": (tensors(lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens"),
    "missing norm": (tensors(lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight"),
    "wrong shape": (tensors(lambda t: t.update({UP: torch.ones(3, 4)})), re.escape(UP)),
    "transposed": (tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), re.escape(UP)),
    "embedding of wrong shape": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(3, 4)})), "lm_head"),
    "no dimension": (tensors(lambda t: t.update({UP: torch.ones(())})), re.escape(UP)),
    "NaN weight": (fill(UP, float("nan")), r"model\.layers\.1\.mlp\.up_proj"),
    "Inf weight": (fill(UP, float("inf")), r"model\.layers\.1\.mlp\.up_proj"),
    "NaN embedding": (fill("model.embed_tokens.weight", float("nan")), "NaN or Inf"),
    "garbage GGUF": (gguf(b"not a GGUF file at all" * 100), r"model\.gguf"),
    "empty GGUF": (gguf(b""), r"model\.gguf"),
    "GGUF cut off": (gguf(HEADER), r"model\.gguf"),
    "GGUF with a lie": (gguf(HEADER + b"\xff" * 64), r"model\.gguf"),
    "GGUF without anything": (gguf(HEADER + b"\0" * 64), r"model\.gguf"),
}
DEEP = {
    "fused experts",
    "NaN weight",
    "Inf weight",
    "NaN embedding",
    "hidden states of another shape",
}  # inspect need not see these


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_is_one_line(tmp_path, kind, method):
    make, said = HOSTILE[kind]
    make(tmp_path)
    if method == "magnitude" and kind in ("hidden states of another shape", "NaN embedding"):
        return  # nothing is computed, so nothing goes wrong
    model = tmp_path / ("model.gguf" if "GGUF" in kind else "model")
    ids = rows()
    ids[0, 0] = 3  # whose embedding may be damaged
    with pytest.raises(SecateurError, match=said) as caught:
        secateur.prune(model, tmp_path / "out", method=method, calibration=ids)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert isinstance(caught.value, NumericsError if kind in ("NaN weight", "Inf weight") else ModelError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - DEEP))
def test_other_commands_say_the_same(tmp_path, kind):
    make, said = HOSTILE[kind]
    make(tmp_path)
    model = tmp_path / ("model.gguf" if "GGUF" in kind else "model")
    with pytest.raises(ModelError, match=said):
        secateur.inspect(model)


def test_a_missing_shard(tmp_path, sharded):
    shutil.copytree(sharded, tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        secateur.prune(tmp_path / "model", tmp_path / "out", calibration=rows())


def test_a_shard_without_its_tensor(tmp_path, sharded):
    shutil.copytree(sharded, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = tmp_path / "model" / index["weight_map"][UP]
    from safetensors.torch import load_file

    save_file({name: t for name, t in load_file(shard).items() if name != UP}, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(UP)):
        secateur.prune(tmp_path / "model", tmp_path / "out", calibration=rows())


@pytest.mark.parametrize(
    "name", ["me/it", "it", "me/it/and/more", "/nowhere", "./nowhere", "no model", "", "nowhere.gguf"]
)
def test_a_model_that_is_not_there(tmp_path, name):
    with pytest.raises(ModelError) as caught:
        secateur.inspect(name)
    assert "\n" not in str(caught.value)


def test_a_live_model_with_a_damaged_weight():
    from tiny import tiny_model

    for method in ("magnitude", "wanda"):
        model = tiny_model("llama")
        model.get_parameter(UP).data[3, 5] = float("nan")
        with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj"):
            secateur.prune(model, method=method, calibration=rows())


def test_generate_needs_a_tokenizer_and_a_prompt(model_directory):
    with pytest.raises(SecateurError, match="no tokenizer"):
        secateur.generate(model_directory("mistral"), "Hello")
    assert isinstance(secateur.generate(model_directory("llama"), "", tokens=2), str)  # <s> alone is a prompt


@pytest.mark.parametrize("extra", [["token_type_ids"], []])
def test_generate_with_any_tokenizer(tmp_path, extra):
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", *extra, "attention_mask"]
    directory = save_tiny(tmp_path / "m", "llama", tokenizer=tokenizer)
    assert secateur.generate(directory, "The gardener", tokens=4)


def test_generate_stays_inside_the_context(tmp_path, tokenizer):
    directory = save_tiny(tmp_path / "m", "gpt2", tokenizer=tokenizer, eos_token_id=None)
    for tokens, prompt in ((200, "The gardener"), (5, "The gardener " * 100)):
        try:
            secateur.generate(directory, prompt, tokens=tokens)
        except SecateurError as error:
            assert "context" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("wnada", ["magnitude", "wanda"], "did you mean wanda?"),
        ("zzz", ["magnitude", "wanda"], "known: magnitude, wanda"),
        ("zzz", [f"name{n}" for n in range(40)], "…"),
        ("", [], "known: "),
    ],
)
def test_nearest(word, known, said):
    assert said in nearest(word, known)
    assert "\n" not in nearest(word, known)
