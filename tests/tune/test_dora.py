"""DoRA against the model whose weights are m V / |V|, and against PEFT: values, gradients, merging, files, training."""

import json
import signal
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.oracle import logits_of, make_oracle, save_theirs, some_ids
from tests.train.tiny_training import TinySource, assert_same_bits, evaluate, tiny_model, train, weights
from tests.tune.test_lora import ids, logits, tiny
from tests.tune.test_peft_files import CLOSE, ours_of
from torch import nn
from torch.func import functional_call

from hanlin.core.errors import HanlinError
from hanlin.models import load_model, save_model
from hanlin.nn.frozen import can_freeze, freeze
from hanlin.nn.linear import Linear
from hanlin.tune import adapter_of, add_lora, load_lora, merge_lora, save_adapter, without_adapter


@torch.no_grad()
def fill(adapter, seed: int = 7) -> None:
    """A and B random, the lengths of rows a third up or down."""
    generator = torch.Generator().manual_seed(seed)
    for branch in adapter.branches.values():
        for factor in (branch.a, branch.b):
            factor.weight.copy_(torch.randn(factor.weight.shape, generator=generator) * 0.2)
        branch.m.weight.mul_(0.7 + 0.6 * torch.rand(branch.m.weight.shape, generator=generator).to(branch.m.weight))


def in_weights(adapter, scale: float) -> dict[str, torch.Tensor]:
    """m V / |V| as functions of A, B and m, by the plain formula."""
    found = {}
    for name, branch in adapter.branches.items():
        moved = branch.layer.weight + scale * branch.b.weight @ branch.a.weight
        length = moved.detach().square().sum(1).sqrt()
        found[f"{name}.weight"] = (branch.m.weight / length)[:, None] * moved
    return found


@pytest.mark.parametrize("targets", ["all", ("q_proj",), ("k_proj", "up_proj"), ("v_proj", "o_proj", "down_proj")])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 24 / 4), (True, 24 / 2)])
def test_it_computes_with_the_weights_as_the_paper_has_them(targets, rslora, scale):
    model = tiny()
    adapter = add_lora(model, 4, 24, targets, rslora=rslora, dora=True)
    fill(adapter)
    found = logits(model)
    base = deepcopy(model)
    base.adapter.remove()
    expected = functional_call(base, in_weights(adapter, scale), (ids(),)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert len(adapter.parameters()) == 3 * len(adapter.branches)
    direction = torch.randn_like(found)
    grads = (torch.autograd.grad(x, adapter.parameters(), direction) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


class Two(nn.Module):
    """A layer with a bias and one without, ours or torch's."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.one, self.two = kind(12, 20), kind(20, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_peft(dtype, close):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, plain = Two(Linear).to(dtype), Two(nn.Linear).to(dtype)
    plain.load_state_dict(ours.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["one", "two"], use_dora=True, use_rslora=True)
    theirs = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    adapter = add_lora(ours, 3, 9, "all", rslora=True, dora=True)
    pairs = []
    for name, branch in adapter.branches.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        pairs += [
            (child.weight, part["default"].weight)
            for child, part in zip(branch.children().values(), parts, strict=True)
        ]
    for mine, other in pairs[2::3]:
        torch.testing.assert_close(mine, other, rtol=close, atol=close)  # the beginning, |W|
    fill(adapter)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    x, other_x = (torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    found, expected = ours(x.requires_grad_()), theirs(other_x.requires_grad_())
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    for result in (found, expected):
        (result.sin() * 3).sum().backward()
    torch.testing.assert_close(x.grad, other_x.grad, rtol=close, atol=close)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=close, atol=close)
    adapter.merge()
    theirs.merge_adapter()
    for name, branch in adapter.branches.items():
        merged = theirs.get_submodule(f"base_model.model.{name}").base_layer.weight
        torch.testing.assert_close(branch.layer.weight, merged, rtol=close, atol=close)


def test_training_starts_from_the_model_as_it_is():
    model = tiny()
    before = logits(model).detach()
    adapter = add_lora(model, targets="all", dora=True)
    assert torch.equal(logits(model), before)
    for branch in adapter.branches.values():
        torch.testing.assert_close(branch.m.weight, branch.layer.weight.norm(dim=1))
    fill(adapter)
    with without_adapter(model):
        assert torch.equal(logits(model), before)
    adapter.remove()
    assert torch.equal(logits(model), before)
    assert not [name for name in model.state_dict() if "lora" in name]


def test_a_row_of_zeros_divides_by_nothing():
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    before = logits(model).detach()
    adapter = add_lora(model, dora=True)
    assert torch.equal(logits(model), before)
    logits(model).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_a_small_stretch_is_whole_in_bf16():
    """1.01 is 1.0078 in bf16: the lengths would go in such steps."""
    torch.manual_seed(0)
    model = Two(Linear).bfloat16()
    adapter = add_lora(model, 2, targets="all", dora=True)
    x = torch.randn(4096, 20).bfloat16()
    before = model.two(x).double()
    with torch.no_grad():
        adapter.branches["two"].m.weight.mul_(1.01)
    grown = (model.two(x).double() * before).sum() / before.square().sum()
    assert 1.0095 < grown < 1.0105


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.02)]
)
def test_merged_it_says_the_same_and_unmerged_it_is_what_it_was(dtype, tolerance):
    model = tiny(dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = add_lora(model, 4, 4, "all", dora=True)
    fill(adapter)
    with torch.no_grad():
        expected = logits(model)
        adapter.merge()
        merged = logits(model)
        adapter.unmerge()
        again = logits(model)
    assert (merged - expected).abs().max() <= 20 * tolerance and (merged != expected).any()
    assert (again - expected).abs().max() <= 20 * tolerance
    for name, value in base.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def test_dropout_acts_on_what_goes_into_a_alone():
    model = tiny()
    adapter = add_lora(model, 4, targets="all", dora=True, dropout=0.5)
    fill(adapter)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    with torch.no_grad():
        for branch in adapter.branches.values():
            branch.b.weight.zero_()
    model.train()
    assert torch.equal(logits(model), logits(model))


def test_a_deep_copy_has_an_adapter_of_its_own():
    model = tiny()
    fill(add_lora(model, targets="all", dora=True))
    expected = logits(model).detach()
    clone = deepcopy(model)
    assert torch.equal(logits(clone), expected)
    fill(clone.adapter, seed=8)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(clone), expected)


@pytest.mark.skipif(not can_freeze(), reason="nothing freezes here")
def test_a_frozen_base_is_refused_by_name():
    model = tiny(torch.float32)
    adapter = add_lora(model, targets="all", dora=True)
    freeze(model)
    with pytest.raises(HanlinError, match="frozen into a faster layout"):
        logits(model)
    with pytest.raises(HanlinError, match="frozen into a faster layout"):
        adapter.merge()


# --- files


@pytest.fixture
def pair(tmp_path):
    """A model of transformers and ours, in fp64, with the same weights, and biases."""
    theirs = make_oracle("qwen2")
    folder = save_theirs(theirs, tmp_path / "base")
    return theirs.double(), load_model(folder, dtype=torch.float64)


def peft_model(theirs, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, lora_dropout=0.1, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
    return model


def test_what_peft_saves_we_load_and_go_on_learning(pair, tmp_path):
    theirs, ours = pair
    model = peft_model(
        theirs, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2}
    )
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_lora(ours, tmp_path / "adapter")
    assert adapter.settings.dora and adapter.settings.dropout == 0.1
    found, expected = ours(some_ids()).logits, model(some_ids()).logits
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=CLOSE)
    for result in (found, expected):
        (result.double().sin() / result.numel()).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    learning = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(learning) == len(grads) == len(adapter.parameters())
    for name, parameter in learning.items():
        expected = grads[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)


def test_what_we_save_peft_loads(pair, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = pair
    fill(add_lora(ours, 3, 24, "all", rslora=True, dora=True))
    save_adapter(ours, tmp_path / "adapter", base="somewhere/base")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).double()
    torch.testing.assert_close(ours_of(ours), logits_of(model, some_ids()), rtol=0, atol=CLOSE)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True and config["base_model_name_or_path"] == "somewhere/base"


def test_saved_and_loaded_it_is_the_same_adapter(pair, tmp_path):
    _, ours = pair
    fill(add_lora(ours, 3, targets=("k_proj", "up_proj"), dora=True))
    expected = ours_of(ours)
    save_adapter(ours, tmp_path / "adapter")
    adapter_of(ours).remove()
    load_lora(ours, tmp_path / "adapter")
    assert torch.equal(ours_of(ours), expected)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, lambda name, t: None if "layers.1" in name and "magnitude" in name else t, "has no lora_magnitude_vector"),
        ({"use_dora": False}, lambda name, t: t, 'has a lora_magnitude_vector, but .* does not set "use_dora"'),
        ({}, lambda name, t: t[:5] if "magnitude" in name else t, r"lora_magnitude_vector of .* is \[5\], expected"),
    ],
)
def test_files_that_do_not_fit_are_refused(pair, tmp_path, config, change, message):
    _, ours = pair
    folder = tmp_path / "adapter"
    adapter = add_lora(ours, 3, targets=("q_proj",), dora=True)
    save_adapter(ours, folder)
    adapter.remove()
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    with pytest.raises(HanlinError, match=message):
        load_lora(ours, folder)
    assert adapter_of(ours) is None and all(p.requires_grad for p in ours.parameters())


def test_an_adapter_that_is_not_there_alone_is_not_saved(pair, tmp_path):
    _, ours = pair
    with pytest.raises(HanlinError, match="no adapter to save"):
        save_adapter(ours, tmp_path / "x")
    add_lora(ours).merge()
    with pytest.raises(HanlinError, match="merged into the weights"):
        save_adapter(ours, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- continuing


def learn(model, steps: int, start: int = 0) -> None:
    """Plain gradient descent, which remembers nothing from step to step."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for step in range(start, start + steps):
        tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(step))
        for p, grad in zip(learning, torch.autograd.grad(model(tokens).logits.square().mean(), learning), strict=True):
            p.data.add_(grad, alpha=-0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_an_open_adapter_continues_as_if_it_had_never_been_saved(tmp_path, dora):
    whole, cut = tiny(), tiny()
    base = {name: value.clone() for name, value in whole.state_dict().items()}
    for model in (whole, cut):
        add_lora(model, 4, targets="all", dora=dora, seed=3)
    learn(whole, 4)
    learn(cut, 2)
    save_adapter(cut, tmp_path / "adapter")
    again = tiny()
    load_lora(again, tmp_path / "adapter")
    learning = [name for name, p in again.named_parameters() if p.requires_grad]
    assert learning == [name for name in again.state_dict() if "lora_" in name]
    learn(again, 2, start=2)
    assert_same_bits(again.state_dict(), whole.state_dict())
    assert (logits(again) - logits(cut)).abs().max() > 1e-6
    assert all(torch.equal(again.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_adapter_continues_with_a_new_one(tmp_path, dora):
    model = tiny()
    add_lora(model, 4, targets="all", dora=dora)
    learn(model, 3)
    expected = logits(model).detach()
    save_adapter(model, tmp_path / "first")
    merged = tiny()
    merge_lora(merged, tmp_path / "first")
    assert adapter_of(merged) is None and all(p.requires_grad for p in merged.parameters())
    save_model(merged, tmp_path / "merged")
    second = load_model(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits(second), expected, rtol=0, atol=1e-10)
    before = logits(second).detach()
    add_lora(second, 2, targets=("q_proj", "up_proj"), dora=dora)
    assert torch.equal(logits(second), before)
    learn(second, 2)
    assert (logits(second) - before).abs().max() > 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, dora):
    def model(seed: int):
        found = tiny_model(seed=seed)
        add_lora(found, 3, targets="all", dora=dora, dropout=0.1, seed=seed)
        return found

    def cut_off(model, step):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(model, step)

    optimizer = {"kind": "adamw", "weight_decay": 0.1}
    settings, data = {"steps": 8, "eval_every": 4, "micro_batch_size": 4, "optimizer": optimizer}, TinySource(8)
    train(tmp_path / "whole", settings, data=data, model=model(0))
    cut = train(tmp_path / "cut", settings, data=data, model=model(0), evaluate=cut_off)
    assert (cut.step, cut.finished) == (4, False)
    again = train(tmp_path / "cut", settings, data=data, model=model(7))
    assert (again.step, again.finished) == (8, True)
    found, start = weights(tmp_path / "cut"), model(0).state_dict()
    assert_same_bits(found, weights(tmp_path / "whole"))
    moved = {name for name, value in found.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name}
