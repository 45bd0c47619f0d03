"""The other engines of `bench_engine.py`, each as `generate(prompt, new)`: greedy, exactly `new` tokens.

transformers is a dependency of the tests. llama.cpp (`pip install llama-cpp-python==0.3.36 gguf`, built from source)
and CTranslate2 (`pip install ctranslate2`) are not: they may lie in another environment, whose site-packages `--peers`
names. All read the same weights, from the folder in Hugging Face's form.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from load import Arrival, play

Generate = Callable[[list[int], int], None]


class Transformers:
    """dtype: "bfloat16" or "float32"; compiled: a static cache and `torch.compile`."""

    def __init__(self, folder: str, dtype: str, *, compiled: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.compiled = torch, compiled
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def config(self, new: int, **more: Any) -> Any:
        from transformers import CompileConfig, GenerationConfig

        if self.compiled:
            compiling = CompileConfig()
            compiling._compile_all_devices = True  # it declines CPUs otherwise
            more |= {"cache_implementation": "static", "compile_config": compiling}
        return GenerationConfig(
            max_new_tokens=new, do_sample=False, use_cache=True, eos_token_id=None, bos_token_id=None, pad_token_id=0,
            **more,
        )  # fmt: skip

    def batch(self, prompts: Sequence[list[int]], new: int) -> None:
        """Padded on the left to the longest."""
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = self.torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=self.config(new))
        assert out.shape[1] == longest + new, out.shape

    def __call__(self, prompt: list[int], new: int) -> None:
        self.batch([prompt], new)

    def padded(self, arrivals: Sequence[Arrival], size: int) -> float:
        """Batches in the order of arrival, each as soon as its requests are there; returns the seconds."""
        began = time.perf_counter()
        for first in range(0, len(arrivals), size):
            part = arrivals[first : first + size]
            time.sleep(max(0.0, began + part[-1].at - time.perf_counter()))
            self.batch([a.prompt for a in part], max(a.new for a in part))
        return time.perf_counter() - began

    def continuous(self, arrivals: Sequence[Arrival], limit: float) -> tuple[float, int]:
        """Its continuous batching; returns seconds and tokens, of those that had ended after `limit` seconds."""
        from transformers import ContinuousBatchingConfig

        tokens = sum(len(a.prompt) + a.new for a in arrivals)
        settings = ContinuousBatchingConfig(  # by itself it takes and clears most of the memory
            page_size=32, num_blocks=tokens // 32 + 2 * len(arrivals), max_batch_tokens=512
        )
        config = self.config(1)
        done = count = 0
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings, timeout=5
        ) as manager:
            player = threading.Thread(
                target=play, args=(arrivals, lambda a: manager.add_request(a.prompt, max_new_tokens=a.new)), daemon=True
            )
            began = time.perf_counter()
            player.start()
            while done < len(arrivals) and time.perf_counter() - began < limit:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    done, count = done + 1, count + len(result.generated_tokens)
            return time.perf_counter() - began, count


class LlamaCpp:
    """kind: "Q8_0" or "BF16". The model is written as F16 once and quantised by llama.cpp itself."""

    def __init__(self, folder: str, kind: str, *, context: int, threads: int) -> None:
        import llama_cpp as L
        import numpy as np

        self.L, self.np = L, np
        path = Path(folder) / f"model-{kind}.gguf"
        if not path.exists():  # in another process: it would tell its progress behind our result
            command = [sys.executable, __file__, folder, kind, str(threads), *sys.path[-1:]]
            subprocess.run(command, check=True, capture_output=True)
        self._quiet = L.llama_log_callback(lambda level, text, data: None)
        L.llama_log_set(self._quiet, None)
        L.llama_backend_init()
        how = L.llama_model_default_params()
        how.use_extra_bufts = False  # its AMX products of int8 crash when GCC 12 compiled them
        self.model = L.llama_model_load_from_file(os.fsencode(path), how)
        wanted = L.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = context, 512, 512
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = L.llama_init_from_model(self.model, wanted)
        assert self.context
        self.vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))

    def __call__(self, prompt: list[int], new: int) -> None:
        L = self.L
        L.llama_memory_clear(L.llama_get_memory(self.context), True)
        for first in range(0, len(prompt), 512):
            self._decode(prompt[first : first + 512])
        for step in range(new):
            logits = self.np.ctypeslib.as_array(L.llama_get_logits_ith(self.context, -1), shape=(self.vocabulary,))
            token = int(logits.argmax())
            if step < new - 1:
                self._decode([token])

    def _decode(self, tokens: list[int]) -> None:
        array = (self.L.llama_token * len(tokens))(*tokens)
        assert self.L.llama_decode(self.context, self.L.llama_batch_get_one(array, len(tokens))) == 0


def quantise(folder: str, kind: str, threads: int) -> None:
    import llama_cpp as L

    plain, path = Path(folder) / "model-F16.gguf", Path(folder) / f"model-{kind}.gguf"
    write_gguf(folder, plain)
    how = L.llama_model_quantize_default_params()
    how.nthread, how.ftype = threads, getattr(L, f"LLAMA_FTYPE_MOSTLY_{kind}")
    assert L.llama_model_quantize(os.fsencode(plain), os.fsencode(path), ctypes.byref(how)) == 0
    plain.unlink()


def write_gguf(folder: str, path: Path) -> None:
    """A Qwen3 folder as F16 GGUF without a tokenizer."""
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    c = json.loads((Path(folder) / "config.json").read_text())
    w = gguf.GGUFWriter(path, "qwen3")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(c["head_dim"])
    w.add_value_length(c["head_dim"])
    w.add_rope_freq_base(1e4)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, c["num_hidden_layers"])
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name != "lm_head.weight":  # tied
                array = tensor.float().numpy()
                found = names.get_name(name, try_suffixes=(".weight", ".bias"))
                w.add_tensor(found, array.astype(np.float16) if array.ndim > 1 else array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class CTranslate2:
    """kind: its `compute_type`. It speaks of tokens by name, so a stub tokenizer t0, t1, … is put beside it."""

    def __init__(self, folder: str, kind: str, *, threads: int) -> None:
        import ctranslate2

        path = Path(folder) / "ctranslate2"
        if not (path / "model.bin").exists():
            convert_to_ctranslate2(folder, path)
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )

    def __call__(self, prompt: list[int], new: int) -> None:
        found = self.generator.generate_batch(
            [[f"t{token}" for token in prompt]], max_length=new, min_length=new, beam_size=1,
            include_prompt_in_result=False, suppress_sequences=[["t1"]],
        )  # fmt: skip
        assert len(found[0].sequences_ids[0]) == new


def convert_to_ctranslate2(folder: str, path: Path) -> None:
    import shutil

    import ctranslate2.converters.transformers as converters
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stub = path.with_name("ctranslate2-source")
    shutil.rmtree(stub, ignore_errors=True)
    stub.mkdir()
    for file in (*Path(folder).glob("*.safetensors*"), *Path(folder).glob("*config.json")):
        shutil.copy(file, stub)
    size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    names = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    names.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(tokenizer_object=names, unk_token="t0", eos_token="t1", bos_token="t2")
    whole.save_pretrained(stub)
    converters.TransformersConverter(str(stub)).convert(str(path), force=True)
    shutil.rmtree(stub)


def look_in(peers: str | None) -> None:
    """Let packages of another environment be found, after our own."""
    if peers:
        sys.path.append(peers)


if __name__ == "__main__":
    look_in(sys.argv[4])
    quantise(sys.argv[1], sys.argv[2], int(sys.argv[3]))
