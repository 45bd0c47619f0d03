"""An engine over two processes writes what an engine in one writes, token for token."""

import json
import subprocess
import sys

import pytest
import torch
from tests.engine.tiny import greedy_uncached
from tests.models.oracle import make_oracle

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine
from hanlin.models import load_model
from hanlin.tokens import Tokenizer

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！\n"
SCRIPT = """
import json, sys
from hanlin.engine import Engine, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
kinds = [greedy, SamplingParams(max_tokens=8, temperature=0, beams=3, n=3, ignore_eos=True)]
with Engine.from_folder(folder, dtype="float32", ranks=2, page_size=16, step_tokens=16, speculate="ngram") as engine:
    texts = [[c.token_ids for c in engine.generate(prompts, kind)] for kind in kinds]
    try:
        engine.embed(prompts[:1])
    except Exception as error:
        refusal = str(error)
print(json.dumps([*texts, refusal]))
"""


@pytest.fixture(scope="module", params=["qwen3", "llama-gqa-4", "mistral"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=300)
    make_oracle(request.param, vocab_size=tokenizer.size).save_pretrained(path)
    tokenizer.save(path)
    return path


def test_two_ranks_write_what_one_does(folder):
    prompts = [[5, 9, 22, 31] * 4, [7], [40, 41, 42, 43, 44]]
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    greedy, beams, refusal = json.loads(done.stdout.splitlines()[-1])
    model = load_model(folder, dtype=torch.float32)
    assert greedy == [greedy_uncached(model, prompt, 20) for prompt in prompts]
    with Engine.from_folder(folder, dtype="float32") as engine:
        from hanlin.engine import SamplingParams

        params = SamplingParams(max_tokens=8, temperature=0, beams=3, n=3, ignore_eos=True)
        assert beams == [c.token_ids for c in engine.generate(prompts, params)]
    assert "several ranks" in refusal


@pytest.mark.parametrize("limits", [{"host_bytes": 1000}, {"speculate": "mtp"}, {"adapters": {"a": "x"}}])
def test_what_several_ranks_do_not_do_is_refused_by_name(folder, limits):
    with pytest.raises(HanlinError, match=next(iter(limits))):
        Engine.from_folder(folder, ranks=2, **limits)
