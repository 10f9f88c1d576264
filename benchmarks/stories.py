"""The second model of the quality tables: a Llama of 260 thousand parameters in llama2.c's layout, for Hugging Face.

    python benchmarks/stories.py stories260K.bin tok512.bin OUTPUT

writes OUTPUT/model (a checkpoint with its tokenizer) and, since there is no text of its kind at hand, stories that the
model itself writes: OUTPUT/train.txt to calibrate on and OUTPUT/test.txt to measure on.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STORIES = {"train": (640, 0), "test": (96, 1)}  # how many, seed
LENGTH = 256


def main():
    weights, pieces, output = map(Path, sys.argv[1:4])
    tokenizer = read_tokenizer(pieces)
    model = read_model(weights)
    for what in (model, tokenizer):
        what.save_pretrained(output / "model")
    for name, (count, seed) in STORIES.items():
        torch.manual_seed(seed)
        start = torch.full((count, 1), tokenizer.bos_token_id)
        ids = model.generate(start, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=LENGTH - 1)
        texts = [text.split("<s>")[0].strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        (output / f"{name}.txt").write_text("\n\n".join(texts) + "\n")


def read_model(path):
    """Return the model of a file in llama2.c's first layout: seven integers, and float32 tensors by kind."""
    data = path.read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, dtype=np.float32, offset=28).copy())
    head, kv = width // heads, width // heads * kv_heads
    offset = 0

    def take(*shape):
        nonlocal offset
        offset += (size := int(np.prod(shape)))
        return values[offset - size : offset].view(shape)

    def halves(W, count):
        """Rotary pairs lie side by side there, and half a head apart here."""
        return W.view(count, head // 2, 2, width).transpose(1, 2).reshape(-1, width)

    state = {"model.embed_tokens.weight": take(abs(vocabulary), width)}
    kinds = [
        ("input_layernorm", (width,)), ("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (kv, width)),
        ("self_attn.v_proj", (kv, width)), ("self_attn.o_proj", (width, width)), ("post_attention_layernorm", (width,)),
        ("mlp.gate_proj", (hidden, width)), ("mlp.down_proj", (width, hidden)), ("mlp.up_proj", (hidden, width)),
    ]  # fmt: skip
    for name, shape in kinds:
        for layer, W in enumerate(take(layers, *shape)):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = halves(W, turned) if turned else W
    state["model.norm.weight"] = take(width)
    config = LlamaConfig(
        vocab_size=abs(vocabulary), hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions, rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"]), missing
    return model


def read_tokenizer(path):
    """Return the tokenizer: pieces with scores, of which the best pair is joined first (SentencePiece's BPE)."""
    data, place, pieces = path.read_bytes(), 4, []
    while place < len(data):
        score, size = struct.unpack("fi", data[place : place + 8])
        pieces.append((data[place + 8 : place + 8 + size].decode("utf-8", "replace"), score))
        place += 8 + size
    words = ["<unk>", "<s>", "</s>", *(piece.replace(" ", "▁") for piece, _ in pieces[3:])]
    words = [f"<0x{number - 3:02X}>" if 3 <= number < 259 else word for number, word in enumerate(words)]
    known = {word: number for number, word in enumerate(words)}
    merges = []
    for number in sorted(range(259, len(words)), key=lambda n: -pieces[n][1]):
        word = words[number]
        merges += [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in known and word[i:] in known]
    inner = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in ("<unk>", "<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    main()
