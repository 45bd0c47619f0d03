"""The critic: begins as the reward model or the policy, reads what the policy wrote, is trained and saved with it."""

import pytest
import torch

from hanlin.align.build import save_trained, with_token_ids
from hanlin.align.critic import Critic, check_critic
from hanlin.align.reference import trained_hidden
from hanlin.align.reward import add_reward_head, answer_rewards
from hanlin.core.errors import HanlinError
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, load_model, save_model
from hanlin.train.choices import AdamW
from hanlin.train.mup import Scale
from hanlin.train.objective import document_mask
from hanlin.train.optim import build_optimizer, group_parameters
from hanlin.tune.lora import add_lora


def config(tokenizer, *, tied: bool = False, positions: int = 64) -> ModelConfig:
    return with_token_ids(
        ModelConfig.uniform(
            "llama", depth=2, attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16),
            feed_forward=FeedForwardConfig(48), vocab_size=tokenizer.size, width=32, max_positions=positions,
            tied_embeddings=tied,
        ),
        tokenizer,
    )  # fmt: skip


@pytest.fixture
def model(tokenizer) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config(tokenizer)).double()


@pytest.fixture
def batch():
    chance = torch.Generator().manual_seed(1)
    groups = []
    for number in range(5):
        length = 6 + 3 * number
        ids = torch.randint(0, 300, (length,), generator=chance).tolist()
        groups.append([Example(ids, [False] * 4 + [True] * (length - 4), str(number))])
    return PackedExamples(groups, seq_len=40, rows_per_step=3, seed=0, pad_id=0).batch(0)


@pytest.mark.parametrize("tied", [False, True])
def test_from_a_reward_model_it_expects_at_the_end_what_that_gives(tokenizer, batch, tied, tmp_path):
    torch.manual_seed(2)
    model = Transformer(config(tokenizer, tied=tied))
    add_reward_head(model, seed=3)
    save_model(model, tmp_path / "rm")
    critic = Critic.from_reward_model(tmp_path / "rm").double()
    model = model.double()
    rewards = answer_rewards(model, batch)
    hidden = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
    everywhere = critic.head(
        critic.trunk(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden
    )
    assert torch.allclose(everywhere[batch.ends()], rewards, atol=1e-12)
    values = critic(batch)
    assert values.shape == (len(batch.trained.ids),)
    assert torch.allclose(values, model.reward.classifier(hidden[batch.trained.at]).squeeze(-1), atol=1e-12)
    assert (critic.trunk.lm_head is None) != tied


def test_from_the_policy_it_reads_alike_and_expects_nothing(model, batch):
    add_lora(model, 4, targets="all", seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    critic = Critic.from_policy(model)
    assert torch.equal(critic(batch), torch.zeros(len(batch.trained.ids), dtype=torch.float64))
    read = critic.trunk(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None).hidden[
        batch.trained.at
    ]
    assert torch.allclose(read, trained_hidden(model, batch), atol=1e-10)  # the adapter is added in
    assert all(p.requires_grad for p in critic.parameters())
    assert not any("lora" in name for name, _ in critic.named_parameters())
    model.critic = critic
    with pytest.raises(HanlinError, match="has a critic already"):
        Critic.from_policy(model)


def test_values_are_fp32_over_narrow_activations(tokenizer, batch):
    torch.manual_seed(0)
    model = Transformer(config(tokenizer))
    critic = Critic.from_policy(model)
    torch.nn.init.normal_(critic.head.value.weight)
    plain, narrow = critic(batch), critic(batch, dtype=torch.bfloat16)
    assert plain.dtype == narrow.dtype == torch.float32
    assert 0 < float((plain - narrow).detach().abs().max()) < 0.2


def test_packed_values_are_those_of_each_document_alone(model, batch):
    """fp64, 1e-12."""
    critic = Critic.from_policy(model)
    torch.nn.init.normal_(critic.head.value.weight)
    together = critic(batch)
    assert not batch.one_document_a_row
    at = 0
    for row in range(len(batch)):
        for number in range(int(batch.documents[row].max()) + 1):
            here = batch.documents[row] == number
            alone = critic.head(critic.trunk(batch.ids[row, here][None], logits=None).hidden)[0]
            expected = alone[batch.trained.at[row, here]]
            assert torch.allclose(together[at : at + len(expected)], expected, atol=1e-12)
            at += len(expected)
    assert at == len(together) > 20


def test_it_is_trained_with_the_policy_in_the_usual_groups_and_left_out_of_the_model_folder(
    model, batch, tokenizer, tmp_path
):
    model = model.float()
    model.critic = Critic.from_policy(model)
    groups = group_parameters(model)
    own = {
        kind: {n for n in getattr(groups, kind) if n.startswith("critic.")}
        for kind in ("matrices", "embeddings", "vectors")
    }
    assert "critic.head.value.weight" in own["matrices"] and "critic.head.value.bias" in own["vectors"]
    assert "critic.trunk.model.embed_tokens.weight" in own["embeddings"]
    assert "critic.trunk.model.layers.0.self_attn.o_proj.weight" in own["matrices"]
    assert not [name for name in groups.head if name.startswith("critic.")]
    everything = {n for n, p in model.named_parameters() if p.requires_grad}
    assert everything == set(groups.all())
    optimizer = build_optimizer(model, AdamW(), 1e-2)
    before = [(model.critic(batch) - 1).square().mean().item()]
    for _ in range(20):
        loss = (model.critic(batch) - 1).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step(1.0)
        before.append(loss.item())
    assert before[-1] < 0.2 * before[0]
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("critic."))

    class Folder:
        path, model = tmp_path, tmp_path / "model"

    class Plain:
        pass

    save_trained(model, tokenizer, Folder, Plain)
    again = load_model(tmp_path / "model")
    assert not hasattr(again, "critic")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_it_may_have_a_rate_of_its_own(model):
    """AdamW's first step moves every number by its rate: nine times as far in the critic."""
    model = model.float()
    model.critic = Critic.from_policy(model)
    scales = {name: Scale(lr=9.0 if name.startswith("critic.") else 1.0) for name, _ in model.named_parameters()}
    optimizer = build_optimizer(model, AdamW(weight_decay=0.0), 1e-3, scales=scales)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        moved = float((before[name] - parameter.detach()).mean())
        assert moved == pytest.approx(9e-3 if name.startswith("critic.") else 1e-3, rel=1e-2), name


def test_a_reward_model_of_another_kind_is_refused_by_what_differs(model, tokenizer):
    small = Transformer(config(tokenizer, positions=32))
    with pytest.raises(HanlinError, match="knows 32 positions and the policy 64"):
        check_critic(model, Critic.from_policy(small))
    few = Transformer(ModelConfig.uniform(
        "llama", depth=1, attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16),
        feed_forward=FeedForwardConfig(48), vocab_size=40, width=32, max_positions=64,
    ))  # fmt: skip
    with pytest.raises(HanlinError, match="knows 40 tokens"):
        check_critic(model, Critic.from_policy(few))
    check_critic(model, Critic.from_policy(model))
