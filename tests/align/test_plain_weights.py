"""What an engine elsewhere is given: the weights with an adapter added in, without a critic."""

import pytest
import torch
from tests.align.on_policy_cases import model_folder

from hanlin.align.critic import Critic
from hanlin.align.rollout import plain_copy, plain_weights
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
