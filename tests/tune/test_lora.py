"""LoRA against the model whose weights are W + s B A, in fp64: values, gradients, merging, switching off."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hanlin.core.errors import HanlinError
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
from hanlin.nn.frozen import can_freeze, freeze
from hanlin.tune import LoraSettings, add_lora, without_adapter

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Two layers with biases in attention, every parameter redrawn."""
    config = ModelConfig.uniform(
        "qwen2", depth=2, attention=AttentionConfig(4, 2, 8, qkv_bias=True), feed_forward=FeedForwardConfig(24),
        vocab_size=31, width=32, max_positions=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.normal_(center, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.eval()


def fill(adapter) -> None:
    """B is zero at the start and would hide every mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for branch in adapter.branches.values():
            for factor in (branch.a, branch.b):
                factor.weight.copy_(torch.randn(factor.weight.shape, generator=generator) * 0.2)


def ids() -> torch.Tensor:
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Transformer) -> torch.Tensor:
    return model(ids()).logits


def in_weights(model: Transformer, adapter, scale: float) -> dict[str, torch.Tensor]:
    """The weights W + s B A, as functions of A and B."""
    return {
        f"{name}.weight": branch.layer.weight + scale * branch.b.weight @ branch.a.weight
        for name, branch in adapter.branches.items()
    }


@pytest.mark.parametrize("targets", ["all", ("q_proj",), ("k_proj", "up_proj"), ("v_proj", "o_proj", "down_proj")])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 24 / 4), (True, 24 / 2)])
def test_it_computes_with_the_weights_plus_the_update(targets, rslora, scale):
    model = tiny()
    adapter = add_lora(model, 4, 24, targets, rslora=rslora)
    fill(adapter)
    found = logits(model)
    base = deepcopy(model)
    base.adapter.remove()
    expected = functional_call(base, in_weights(model, adapter, scale), (ids(),)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(found)
    grads = (torch.autograd.grad(x, adapter.parameters(), direction) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


def test_training_starts_from_the_model_as_it_is():
    model = tiny()
    before = logits(model).detach()
    adapter = add_lora(model, targets="all")
    assert torch.equal(logits(model), before)
    assert all((branch.b.weight == 0).all() for branch in adapter.branches.values())


def test_only_the_adapter_learns_and_its_start_is_told_by_the_seed():
    model = tiny()
    adapter = add_lora(model, 3, targets=("q_proj", "up_proj"), seed=5)
    logits(model).square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt == {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnt == {
        f"model.layers.{i}.{path}.lora_{x}.weight" for i in (0, 1) for x in "AB" for path in
        ("self_attn.q_proj", "mlp.up_proj")
    }  # fmt: skip
    same, other = (add_lora(tiny(), 3, targets=("q_proj", "up_proj"), seed=seed) for seed in (5, 6))
    first = [a.branches["model.layers.1.mlp.up_proj"].a.weight for a in (adapter, same, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert first[0].abs().max() <= 32**-0.5 and 0.4 < first[0].std() * 32**0.5 < 0.7


def test_an_optimizer_step_changes_the_adapter_and_nothing_else():
    model = tiny()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = add_lora(model, targets="all")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    before = logits(model).detach()
    for _ in range(2):
        optimizer.zero_grad()
        logits(model).logsumexp(-1).sum().backward()
        optimizer.step()
    assert (logits(model) - before).abs().max() > 1e-3
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.02)]
)
def test_merged_it_says_the_same_and_unmerged_it_is_what_it_was(dtype, tolerance):
    model = tiny(dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = add_lora(model, 4, 4, "all")
    fill(adapter)
    with torch.no_grad():
        expected = logits(model)
        adapter.merge()
        assert adapter.merged and not adapter.on
        merged = logits(model)
        adapter.unmerge()
        again = logits(model)
    assert (merged - expected).abs().max() <= 20 * tolerance and (merged != expected).any()
    assert (again - expected).abs().max() <= 20 * tolerance
    for name, value in base.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def test_merged_and_removed_a_plain_model_is_left():
    model = tiny()
    plain = set(model.state_dict())
    adapter = add_lora(model, targets="all")
    fill(adapter)
    expected = logits(model).detach()
    adapter.merge()
    adapter.remove()
    assert set(model.state_dict()) == plain and not hasattr(model, "adapter")
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model).detach(), expected, rtol=0, atol=1e-10)
    add_lora(model)  # a new one may come


def test_removed_unmerged_the_base_is_left():
    model = tiny()
    model.model.embed_tokens.requires_grad_(False)
    before = logits(model).detach()
    adapter = add_lora(model)
    fill(adapter)
    adapter.remove()
    assert torch.equal(logits(model).detach(), before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_without_the_adapter_the_model_is_its_base():
    model = tiny()
    before = logits(model).detach()
    adapter = add_lora(model, targets="all")
    fill(adapter)
    tuned = logits(model).detach()
    assert (tuned - before).abs().max() > 0.1
    with without_adapter(model):
        assert torch.equal(logits(model), before)
        with without_adapter(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(ZeroDivisionError), without_adapter(model):
        _ = 1 / 0
    assert torch.equal(logits(model), tuned)
    with without_adapter(tiny()):
        pass


def test_dropout_acts_in_training_alone_and_on_the_branch_alone():
    model = tiny()
    adapter = add_lora(model, 4, targets=("q_proj", "o_proj"), dropout=0.5)
    fill(adapter)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    several = torch.stack([logits(model).detach() for _ in range(3)])
    assert (several[0] != several[1]).any()
    with without_adapter(model):
        assert torch.equal(logits(model), logits(model))


def test_dropout_keeps_the_mean():
    layer = tiny()
    branch = add_lora(layer, 4, targets=("o_proj",), dropout=0.3).branches["model.layers.0.self_attn.o_proj"]
    fill(layer.adapter)
    x = torch.randn(1, 32, dtype=torch.float64)
    expected = branch(x, torch.zeros_like(x))
    branch.a.train()
    torch.manual_seed(0)
    many = x.expand(40_000, -1)
    mean = branch(many, torch.zeros_like(many)).mean(0, keepdim=True)
    assert (mean - expected).norm() <= 0.05 * expected.norm()


def test_a_deep_copy_has_an_adapter_of_its_own():
    model = tiny()
    adapter = add_lora(model, targets="all")
    fill(adapter)
    expected = logits(model).detach()
    clone = deepcopy(model)
    assert torch.equal(logits(clone), expected)
    with torch.no_grad():
        for parameter in clone.adapter.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(clone), expected)


def test_casting_the_model_casts_the_adapter():
    model = tiny()
    adapter = add_lora(model, targets="all")
    fill(adapter)
    expected = logits(model)
    torch.testing.assert_close(logits(model.float()).double(), expected, rtol=0, atol=1e-4)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_factors_are_at_least_fp32_unless_told():
    assert {p.dtype for p in add_lora(tiny(torch.bfloat16)).parameters()} == {torch.float32}
    assert {p.dtype for p in add_lora(tiny()).parameters()} == {torch.float64}
    assert {p.dtype for p in add_lora(tiny(), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    model = tiny(torch.bfloat16)
    fill(add_lora(model, targets="all"))
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.skipif(not can_freeze(), reason="oneDNN's layouts are not measured on this machine")
def test_a_frozen_base_keeps_its_adapter():
    model = tiny(torch.float32)
    adapter = add_lora(model, targets="all")
    fill(adapter)
    with torch.inference_mode():
        expected = logits(model)
        assert freeze(model)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    with pytest.raises(HanlinError, match="frozen into a faster layout"):
        adapter.merge()
    assert not adapter.merged and adapter.on


def test_targets_are_the_ends_of_names():
    cases = {
        ("q_proj",): [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
        ("layers.1.mlp.up_proj",): ["model.layers.1.mlp.up_proj"],
        ("mlp.down_proj", "model.layers.0.self_attn.k_proj"): [
            "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
        ],
    }  # fmt: skip
    for targets, expected in cases.items():
        assert list(add_lora(tiny(), targets=targets).branches) == expected
    every = add_lora(tiny(), targets="all").branches
    assert {name.split(".")[-1] for name in every} == set(LEAVES) and len(every) == 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank of a LoRA is 0"),
        ({"rank": -8}, "rank of a LoRA is -8"),
        ({"rank": 2.5}, "rank of a LoRA is 2.5"),
        ({"alpha": 0}, "`alpha` of a LoRA is 0"),
        ({"dropout": 1.0}, "`dropout` of a LoRA is 1.0"),
        ({"targets": ("q_porj",)}, 'no linear layer "q_porj".*Did you mean "q_proj"'),
        ({"targets": ("mlp.gate",)}, 'no linear layer "mlp.gate".*Did you mean "mlp.gate_proj"'),
        ({"targets": ("lm_head",)}, "output head cannot have a LoRA"),
        ({"targets": ()}, "`targets` is empty"),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(settings, message):
    model = tiny()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(HanlinError, match=message):
        add_lora(model, **settings)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_what_cannot_be_done_now_is_refused():
    model = tiny()
    adapter = add_lora(model)
    with pytest.raises(HanlinError, match="has an adapter already"):
        add_lora(model)
    with pytest.raises(HanlinError, match="not merged"):
        adapter.unmerge()
    with without_adapter(model), pytest.raises(HanlinError, match="switched off"):
        adapter.merge()
    adapter.merge()
    with pytest.raises(HanlinError, match="merged already"):
        adapter.merge()
    with pytest.raises(HanlinError, match="cannot be switched off"), without_adapter(model):
        pass


def test_the_scale_is_that_of_the_papers():
    assert LoraSettings(16, 8).scale == 0.5 and LoraSettings(16, 8, rslora=True).scale == 2.0


def test_without_branches_a_layer_runs_what_it_ran():
    """No adapter, no operation: the hooks are `None`."""
    model = tiny()
    adapter = add_lora(model)
    adapter.remove()
    for module in model.modules():
        assert getattr(module, "branch", None) is None and not getattr(module, "branched", False)
    assert isinstance(model, nn.Module)
