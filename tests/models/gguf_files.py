"""GGUF files for tests, written by the `gguf` package's writer: tiny random models, tiny tokenizers."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

PLAIN = {"F32": np.float32, "F16": np.float16}
LETTERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]


def write_gguf(
    path: Path, model: PreTrainedModel, kind: str = "F32", *, tokenizer: bool = True, add=lambda writer: None
) -> dict[str, torch.Tensor]:
    """The model as llama.cpp's converter lays it out, its matrices as `kind`. Returns what a reader should find, under
    transformers' names. add: writes more into the file."""
    config = model.config
    family, heads, kv = config.model_type, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if tokenizer:
        add_tokenizer(writer)
    add(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    found = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        turned = {"q_proj": heads, "k_proj": kv}.get(theirs.split(".")[-2]) if family == "llama" else None
        stored = in_pairs(values, turned) if turned else values
        number = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = gguf.quants.quantize(stored, number)
        writer.add_tensor(name, data, raw_dtype=number)
        read = gguf.quants.dequantize(data, number)
        found[theirs] = torch.tensor(in_halves(read, turned) if turned else read)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(LETTERS)
    writer.add_token_types([3, 3, 3] + [1] * (len(LETTERS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows, so that row i of its first half and row i of its second are neighbours."""
    out, dim = np.empty_like(values), len(values) // heads
    for row in range(len(values)):
        head, place = divmod(row, dim)
        half, i = divmod(place, dim // 2)
        out[head * dim + 2 * i + half] = values[row]
    return out


def in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    return values[np.argsort(in_pairs(np.arange(len(values)), heads))].copy()
