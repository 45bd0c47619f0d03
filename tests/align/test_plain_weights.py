"""What an engine elsewhere is given (weights with an adapter added in, no critic), and what it does with that."""

from dataclasses import replace

import pytest
import torch
from tests.align.on_policy_cases import model_folder

from hanlin.align.critic import Critic
from hanlin.align.ray_rollout import Plan, Writer, sendable
from hanlin.align.rollout import LocalRollout, plain_copy, plain_weights, prompt_seeds
from hanlin.align.samples import Prompt
from hanlin.core.errors import HanlinError
from hanlin.engine import SamplingParams
from hanlin.models import load_model
from hanlin.tune.lora import add_lora


@pytest.mark.parametrize("dora", [False, True])
def test_a_plain_copy_says_what_the_adapted_model_says(tmp_path, tokenizer, dora):
    """LoRA and DoRA, fp32, logits within 1e-5."""
    model = load_model(model_folder(tmp_path / "model", tokenizer), dtype=torch.float32, device="cpu")
    ids = torch.tensor([tokenizer.encode("one two 二加二")])
    before = model(ids).logits
    adapter = add_lora(model, rank=4, targets=["q_proj", "down_proj"], dora=dora)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.rand(parameter.shape))
    model.critic = Critic.from_policy(model)
    wanted = model(ids).logits
    assert (wanted - before).abs().max() > 1e-2
    copy = plain_copy(model, torch.float32)
    torch.testing.assert_close(copy(ids).logits, wanted, rtol=0, atol=1e-5)
    assert not hasattr(copy, "adapter") and not hasattr(copy, "critic")


def test_what_has_no_adapter_is_not_copied(tmp_path, tokenizer):
    model = load_model(model_folder(tmp_path / "model", tokenizer), dtype=torch.float32, device="cpu")
    known = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert {name: tensor.data_ptr() for name, tensor in plain_weights(model).items()} == known


def writer_of(model, tokenizer, **changes):
    """The actor of `RayRollout`, in this process."""
    plan = Plan(model.config, tokenizer, {"max_batch": 8}, None, None, torch.get_num_threads(), "cpu")
    return Writer(replace(plan, **changes))


def sent(model):
    return {name: sendable(tensor.clone()) for name, tensor in plain_weights(model).items()}


@pytest.mark.parametrize("packed", [None, torch.float32, torch.bfloat16])
def test_a_writer_follows_the_weights_that_it_is_sent(tmp_path, tokenizer, packed):
    """Version after version it writes what a local rollout of the same kind does, token by token."""
    model = load_model(model_folder(tmp_path / "model", tokenizer), dtype=torch.float32, device="cpu")
    asked = [Prompt(tuple(tokenizer.encode(text)), text, {}, i) for i, text in enumerate(("one two", "二加二"))]
    params, seeds = SamplingParams(max_tokens=8), prompt_seeds(asked, 5)
    writer, rollout = writer_of(model, tokenizer, packed=packed), LocalRollout(model, tokenizer, packed=packed)
    texts = []
    for version in range(3):
        rollout.refresh(version)
        writer.refresh(sent(model), None, version)
        found = writer.write(asked, params, 2, seeds, 5, version)
        wanted = rollout.write(asked, params, copies=2, seed=5)
        assert [s.ids for s in found] == [s.ids for s in wanted] and {s.version for s in found} == {version}
        assert [s.logp for s in found] == [s.logp for s in wanted]
        texts.append([s.logp for s in found])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
    assert texts[0] != texts[1] != texts[2]
    rollout.close()


def test_a_writer_refuses_what_it_cannot_do(tmp_path, tokenizer):
    model = load_model(model_folder(tmp_path / "model", tokenizer), dtype=torch.float32, device="cpu")
    asked = [Prompt(tuple(tokenizer.encode("one")), "one", {}, 0)]
    writer = writer_of(model, tokenizer)
    writer.refresh(sent(model), None, 4)
    with pytest.raises(HanlinError, match="has version 4 of the weights and is asked for 5"):
        writer.write(asked, SamplingParams(max_tokens=2), 1, [1], 0, 5)
    writer = writer_of(model, tokenizer, limits={"max_context": 4096})
    writer.refresh(sent(model), None, 0)
    with pytest.raises(HanlinError, match="max_context is 4096"):
        writer.write(asked, SamplingParams(max_tokens=2), 1, [1], 0, 0)
