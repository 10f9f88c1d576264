"""MODEL as a GGUF file of many architectures: the model it was made from, or one line that says why not."""

import json
import re
import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import secateur
from secateur.errors import ModelError
from tiny import TEXT, rows, same_bytes, tensors_of, tiny_model, tiny_tokenizer

EPSILON = 2.0**-12  # exact in float32, as the file has it
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": EPSILON}
FAMILIES = {  # name: architecture in the file, family of the model, what is set in its config, type of tokenizer
    "llama": ("llama", "llama", ROPE, "llama"),
    "llama-tied": ("llama", "llama", {**ROPE, "tie_word_embeddings": True}, "gpt2"),
    "mistral": ("llama", "mistral", {**ROPE, "sliding_window": None}, "llama"),  # as llama.cpp names it
    "qwen2": ("qwen2", "qwen2", ROPE, "gpt2"),
    "qwen3": ("qwen3", "qwen3", {**ROPE, "head_dim": 128}, "gpt2"),
    "gemma2": ("gemma2", "gemma2", {**ROPE, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}, "llama"),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"rms_norm_eps": EPSILON, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True},
        "llama",
    ),
    "gpt2": ("gpt2", "gpt2", {"n_positions": 1024, "layer_norm_epsilon": EPSILON}, "gpt2"),
    "phi3": ("phi3", "phi3", ROPE, "llama"),
    "starcoder2": ("starcoder2", "starcoder2", {"norm_epsilon": EPSILON, "tie_word_embeddings": True}, "gpt2"),
    "stablelm": ("stablelm", "stablelm", {"layer_norm_eps": EPSILON}, "gpt2"),
    "nemotron": ("nemotron", "nemotron", {"norm_eps": EPSILON}, "llama"),
}
SHIFTED_NORMS = ("gemma2", "gemma3", "nemotron")  # llama.cpp stores their norms plus one


def tokenizer_of(kind):
    """The tiny tokenizer, or one of the same size for bytes."""
    if kind == "llama":
        return tiny_tokenizer()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT + TEXT.upper() + "0123456789\n:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def original(name, **changes):
    """The model that a file is made from; its norms are multiples of 1/256, so that plus one loses nothing."""
    _, family, settings, _ = FAMILIES[name]
    model = tiny_model(family, **{**settings, **changes})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.mul_(256).round_().div_(256).add_(0)  # and no minus zero
    return model


def add_metadata(writer, arch, config):
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    width, heads = config.hidden_size, config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_vocab_size(config.vocab_size)
    for setting, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("layer_norm_epsilon", writer.add_layer_norm_eps),
        ("norm_epsilon", writer.add_layer_norm_eps),
        ("sliding_window", writer.add_sliding_window),
        ("head_dim", writer.add_key_length),
        ("head_dim", writer.add_value_length),
    ):
        if getattr(config, setting, None) is not None:
            add(getattr(config, setting))
    if rope.get("rope_theta"):
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(getattr(config, "head_dim", None) or width // heads)


def add_tokenizer(writer, kind):
    pieces = tokenizer_of(kind).backend_tokenizer
    vocabulary = sorted(pieces.get_vocab(), key=pieces.get_vocab().get)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(n) for n in range(len(vocabulary))])
    writer.add_token_types([3, 3, 3, 2] + [1] * (len(vocabulary) - 4))
    merges = json.loads(pieces.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for number, add in enumerate((writer.add_pad_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(number)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(kind == "llama")


def stored(arch, config, name, key, tensor):
    """A tensor as llama.cpp's converter stores it."""
    if arch == "llama" and re.search(r"attn_[qk]\.", name):  # halves of the rotary dimensions become pairs
        heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if arch in SHIFTED_NORMS and name.endswith("norm.weight"):
        tensor = tensor + 1
    if arch == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", key):
        tensor = tensor.T
    return np.ascontiguousarray(tensor.numpy())


def write_gguf(path, name, model=None, *, kind=None, change=lambda tensors: None, describe=lambda writer: None):
    """Write a tiny model as a GGUF file; `change` edits its tensors, `describe` its metadata."""
    arch, _, _, tokenizer = FAMILIES[name]
    model = original(name) if model is None else model
    config, known = model.config, {word: key for key, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            written = names.get_name(key, try_suffixes=(".weight", ".bias"))
            tensors[written] = stored(arch, config, written, key, tensor)
    change(tensors)
    writer = gguf.GGUFWriter(str(path), kind or arch)
    writer.add_name(f"Tiny {name}")
    add_metadata(writer, arch, config)
    add_tokenizer(writer, tokenizer)
    describe(writer)
    for written, tensor in tensors.items():
        quantised = tensor.dtype == np.uint8
        writer.add_tensor(written, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A file, and the model in it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = original(request.param)
    path = write_gguf(folder / f"{request.param}.gguf", request.param, model)
    return SimpleNamespace(name=request.param, path=path, model=model.to(torch.bfloat16))


def is_pruned(name, tensor):
    return tensor.ndim == 2 and re.search(r"\.(layers|h)\.\d+\.", name) is not None


def test_half_of_the_matrices_goes_and_the_rest_stays(tmp_path, made):
    out = tmp_path / "out"
    report = secateur.prune(made.path, out, method="magnitude", sparsity=0.5).report
    found = AutoModelForCausalLM.from_pretrained(out)
    before, after = made.model.state_dict(), found.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        kept = tensor != 0 if is_pruned(name, tensor) else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], before[name][kept]), name
        assert int(kept.sum()) * (2 if is_pruned(name, tensor) else 1) == tensor.numel(), name
    assert report["bytes"]["source_files"] == made.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_its_config_computes_what_the_model_computed(tmp_path, made):
    secateur.prune(made.path, tmp_path / "out", method="magnitude", sparsity=0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = original(made.name)
    expected.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(found(rows()).logits, expected(rows()).logits)


def test_it_is_calibrated_like_the_model(tmp_path, made):
    made.model.save_pretrained(tmp_path / "model")
    secateur.prune(made.path, tmp_path / "out", method="wanda", calibration=rows())
    secateur.prune(tmp_path / "model", tmp_path / "reference", method="wanda", calibration=rows())
    assert same_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "reference"))


def test_its_tokenizer_comes_with_it(tmp_path, made):
    out = tmp_path / "out"
    secateur.prune(made.path, out, method="magnitude")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    ids = AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(made.path.parent, gguf_file=made.path.name)(TEXT)["input_ids"]
    if not made.name.startswith("gemma"):  # whose tokenizers begin a text without a space
        assert ids == tokenizer_of(FAMILIES[made.name][3])(TEXT)["input_ids"]


def test_a_quantised_matrix_is_dequantised(tmp_path):
    name, q8 = "model.layers.1.mlp.up_proj.weight", gguf.GGMLQuantizationType.Q8_0
    exact = original("llama").state_dict()[name]
    blocks = gguf.quantize(exact.numpy(), q8)

    def quantise(tensors):
        tensors["blk.1.ffn_up.weight"] = blocks

    path = write_gguf(tmp_path / "m.gguf", "llama", change=quantise)
    secateur.prune(path, tmp_path / "out", method="magnitude", sparsity=0)
    found = tensors_of(tmp_path / "out")[name]
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(blocks, q8)).to(torch.bfloat16))
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((found - exact).abs() <= 0.51 * step + exact.abs() / 128).all()
    assert not torch.equal(found, exact.to(torch.bfloat16))


def refused(path, said, method="magnitude"):
    """Pruning the file is refused in one line that names it, and nothing is left behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ModelError, match=said) as caught:
        secateur.prune(path, path.parent / "out", method=method, calibration=rows())
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 600
    assert sorted(path.parent.iterdir()) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", "llama").read_bytes()


@pytest.mark.parametrize("kept", [3, 20, 100, 4000, "table", "tensors", -1])
def test_a_file_that_was_cut_off(tmp_path, whole, kept):
    cuts = {"table": whole.rindex(b"output_norm.weight") + 20, "tensors": len(whole) // 2}
    (tmp_path / "m.gguf").write_bytes(whole[: cuts.get(kept, kept)])
    refused(tmp_path / "m.gguf", "cannot open this GGUF file")


@pytest.mark.parametrize(
    "begin",
    [
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"PK\x03\x04\x00\x00pytorch_model/data.pkl",
        b"tjgg\x03\x00\x00\x00",
        b"<!DOCTYPE html><html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 135\n",
    ],
    ids=["safetensors", "pickle", "ggjt", "html", "pointer"],
)
def test_a_file_of_another_format(tmp_path, begin):
    (tmp_path / "m.gguf").write_bytes(begin + bytes(300))
    refused(tmp_path / "m.gguf", "not a GGUF file")


@pytest.mark.parametrize("kind", ["nonesuch", "olmo2"])
def test_an_architecture_that_transformers_does_not_read(tmp_path, kind):
    refused(write_gguf(tmp_path / "m.gguf", "llama", kind=kind), f"{kind} is not supported")


@pytest.mark.parametrize("written", ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"])
def test_a_tensor_that_is_not_there(tmp_path, written):
    path = write_gguf(tmp_path / "m.gguf", "llama", change=lambda tensors: tensors.pop(written))
    refused(path, "layers.1.self_attn.q_proj|model.norm|embed_tokens")


def test_a_tensor_of_another_shape(tmp_path):
    """Transformers takes a Qwen3's head_dim for 128, whatever the file says."""
    path = write_gguf(tmp_path / "m.gguf", "qwen3", original("qwen3", head_dim=8))
    refused(path, "shape")


def test_biases_that_the_architecture_has_no_place_for(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", original("llama", attention_bias=True))
    refused(path, "weights")


def test_merges_of_unknown_pieces(tmp_path):
    def describe(writer):
        writer.kv_data[0]["tokenizer.ggml.merges"].value[0] = "no such"

    refused(write_gguf(tmp_path / "m.gguf", "llama", describe=describe), "tokenizer|vocabulary")


def test_scaled_rotary_positions_are_not_lost_in_silence(tmp_path, messages):
    def scale(tensors):
        tensors["rope_freqs.weight"] = np.linspace(1, 8, 4, dtype=np.float32)

    path = write_gguf(tmp_path / "m.gguf", "llama", change=scale)
    secateur.prune(path, tmp_path / "out", method="magnitude")
    assert any("rope_freqs" in message and str(path) in message for message in messages)


def test_its_licence_reaches_the_card(tmp_path):
    def describe(writer):
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "de"])

    path = write_gguf(tmp_path / "m.gguf", "llama", describe=describe)
    secateur.prune(path, tmp_path / "out", method="magnitude")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0\n" in card and "language:\n- en\n- de\n" in card
    path = write_gguf(tmp_path / "silent.gguf", "llama")
    secateur.prune(path, tmp_path / "silent", method="magnitude")
    assert "license" not in (tmp_path / "silent" / "README.md").read_text().split("---")[1]
