"""Factors of width transfer are those of the table; activations move alike at every width, and the best rate stays."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hanlin.core.errors import HanlinError
from hanlin.models.config import (
    AttentionConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    RelativeAttentionConfig,
)
from hanlin.models.transformer import Transformer
from hanlin.nn.routing import RouterConfig
from hanlin.train.mup import Scale, scale_weights, split_by_scale, width_scales

BASE, VOCABULARY, LENGTH = 32, 32, 16


def config_of(width: int, *, head_dim: int = 16, heads: int | None = None, **rest) -> ModelConfig:
    heads = width // head_dim if heads is None else heads
    attention = AttentionConfig(heads, heads, head_dim, qk_norm=rest.pop("qk_norm", False))
    settings = {"feed_forward": FeedForwardConfig(2 * width), "vocab_size": VOCABULARY, "init_std": BASE**-0.5, **rest}
    return ModelConfig.uniform("llama", depth=2, attention=attention, width=width, **settings)


def made(config: ModelConfig, *, transfer: bool, seed: int = 0, base_head_dim: int | None = None):
    """A model, and its optimiser as a function of the rate."""
    torch.manual_seed(seed)
    model = Transformer(config)
    base = BASE if transfer else config.width
    scales = width_scales(config, base, base_head_dim=base_head_dim if transfer else None)
    scale_weights(model, scales)
    groups = split_by_scale(dict(model.named_parameters()), scales)

    def optimizer(rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(
            [{"params": p, "lr": rate * scale.lr} for scale, p in groups.items()], betas=(0.9, 0.95)
        )

    return model, optimizer


def rows_of(step: int, rows: int = 8) -> torch.Tensor:
    """Walks through a fixed random table of transitions."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)).mul(2).softmax(-1)
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(table[ids[:, -1]], 1, generator=generator)], 1)
    return ids


def train(model: Transformer, optimizer: torch.optim.Adam, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = rows_of(step)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_factors_are_those_of_the_table():
    scales = width_scales(config_of(4 * BASE), BASE)
    hidden, plain = Scale(1 / 4, 1 / 2, 4), Scale()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert scales[f"model.layers.1.{name}.weight"] == hidden, name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert scales[name] == plain, name
    assert scales["model.norm.weight"] == Scale(1 / 4, 1 / 4)
    assert scales.keys() == dict(Transformer(config_of(4 * BASE)).named_parameters()).keys()


def test_at_the_base_width_nothing_changes():
    assert set(width_scales(config_of(BASE), BASE).values()) == {Scale()}


def test_experts_are_hidden_and_the_router_is_an_output():
    experts = ExpertsConfig(4, 64, RouterConfig(2, bias=True), bias=True, shared_hidden=32, shared_gate=True)
    scales = width_scales(config_of(2 * BASE, feed_forward=experts), BASE)
    found = {
        name.removeprefix("model.layers.0.mlp."): scale for name, scale in scales.items() if "layers.0.mlp" in name
    }
    few = {name for name, scale in found.items() if scale == Scale(1 / 2, 1 / 2, 2)}
    assert any("gate.weight" in name or "router" in name for name in few)
    assert all(scale == Scale() for name, scale in found.items() if name.endswith("bias"))
    assert all(found[name] == Scale(1 / 2, 0.5**0.5, 2) for name in found if "experts" in name and "bias" not in name)


def test_the_last_norm_is_the_multiplier_of_the_output():
    """One step of Adam with 1/m in the norm's weight and rate is one with the logits divided by m: within 1e-5."""
    config = config_of(4 * BASE)
    folded, optimizer = made(config, transfer=True)
    scales = width_scales(config, BASE)
    torch.manual_seed(0)
    plain = Transformer(config)
    scale_weights(plain, {**scales, "model.norm.weight": Scale()})
    groups = split_by_scale(dict(plain.named_parameters()), {**scales, "model.norm.weight": Scale()})
    other = torch.optim.Adam([{"params": p, "lr": 1e-2 * scale.lr} for scale, p in groups.items()], betas=(0.9, 0.95))
    mine = optimizer(1e-2)
    for step in range(3):
        ids = rows_of(step)
        losses = []
        for model, chosen, factor in ((folded, mine, 1.0), (plain, other, 1 / 4)):
            loss = F.cross_entropy((model(ids[:, :-1]).logits * factor).flatten(0, 1), ids[:, 1:].flatten())
            chosen.zero_grad()
            loss.backward()
            chosen.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("qk_norm", (False, True))
def test_wider_heads_score_by_their_width(qk_norm):
    """Heads twice as wide: scores get sqrt(1/2) besides the usual 1/sqrt(d), at the start and in every update."""
    config = config_of(2 * BASE, head_dim=32, qk_norm=qk_norm)
    one, same = (width_scales(config, BASE, base_head_dim=base) for base in (16, 32))
    name = f"model.layers.0.self_attn.{'q_norm' if qk_norm else 'q_proj'}.weight"
    assert same == width_scales(config, BASE)
    assert one[name].lr == pytest.approx(same[name].lr * 0.5**0.5)
    assert one[name].init == pytest.approx(same[name].init * 0.5**0.5)
    assert {other: scale for other, scale in one.items() if one[other] != same[other]}.keys() == {
        other for other in one if other.endswith(name.split("self_attn")[1])
    }


def test_a_norm_stored_as_its_difference_from_one_is_scaled_as_a_whole():
    config = config_of(4 * BASE, norm=NormConfig(unit_offset=True))
    model, _ = made(config, transfer=True)
    assert torch.allclose(1 + model.model.norm.weight, torch.full((4 * BASE,), 0.25))


REFUSED = {
    "no head": ({"head": None}, "no last norm"),
    "transform": ({"head": HeadConfig(transform="gelu")}, "transform"),
    "T5": ({"head": HeadConfig(input_scale=0.1)}, "scales by 0.1"),
    "Gemma": ({"embedding": EmbeddingConfig(scale=8.0)}, "embedding is scaled by 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_the_table_does_not_fit_are_refused_by_name(name):
    changed, message = REFUSED[name]
    with pytest.raises(HanlinError, match=f"mup_base_width.*{message}"):
        width_scales(config_of(BASE, **changed), BASE)


def test_heads_of_other_kinds_are_refused():
    config = config_of(BASE)
    relative = replace(config, layers=(replace(config.layers[0], attention=RelativeAttentionConfig(2, 16)),))
    with pytest.raises(HanlinError, match="relative attention"):
        width_scales(relative, BASE)
    mixed = replace(config.layers[1], attention=replace(config.layers[1].attention, head_dim=32))
    with pytest.raises(HanlinError, match="base_head_dim"):
        width_scales(replace(config, layers=(config.layers[0], mixed)), BASE, base_head_dim=16)


WIDTHS = (32, 64, 128, 256)


def std_of(width: int, *, transfer: bool) -> float:
    """Without transfer every matrix begins with 1 / sqrt(width), as is usual; with it `scale_weights` sees to that."""
    return (BASE if transfer else width) ** -0.5


def keep(found: dict[str, torch.Tensor], name: str, module, inputs, output: torch.Tensor) -> None:
    found[name] = output.detach()


def moved(width: int, *, transfer: bool) -> dict[str, float]:
    """Root mean square of what 12 steps change in the outputs of each layer, and in the logits."""
    model, optimizer = made(config_of(width, init_std=std_of(width, transfer=transfer)), transfer=transfer)
    ids = rows_of(999)[:, :-1]
    seen: list[dict[str, torch.Tensor]] = []
    for steps in (0, 12):
        train(model, optimizer(1e-2), steps)
        found: dict[str, torch.Tensor] = {}
        hooks = [
            layer.register_forward_hook(partial(keep, found, f"layer {n}"))
            for n, layer in enumerate(model.model.layers)
        ]
        found["logits"] = model(ids).logits.detach()
        seen.append(found)
        for hook in hooks:
            hook.remove()
    return {name: float((seen[1][name] - tensor).square().mean().sqrt()) for name, tensor in seen[0].items()}


def slope(sizes: list[float]) -> float:
    """Of log size over log width."""
    x = torch.tensor([math.log(width) for width in WIDTHS])
    y = torch.tensor(sizes).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_coordinate_check_what_steps_change_is_as_large_at_every_width():
    """Exponent of the width within 0.2 of 0 with transfer; in every layer above 0.5 without (the paper's figure 5)."""
    for transfer in (True, False):
        sizes = [moved(width, transfer=transfer) for width in WIDTHS]
        slopes = {name: slope([size[name] for size in sizes]) for name in sizes[0]}
        if transfer:
            assert all(abs(value) < 0.2 for value in slopes.values()), slopes
        else:
            assert slopes["layer 0"] > 0.5 and slopes["layer 1"] > 0.5, slopes


RATES = tuple(2.0**-n for n in range(11, 3, -1))


def best_rate(width: int, *, transfer: bool, among: range = range(len(RATES))) -> int:
    """Number of the rate with the lowest loss over the last 10 of 40 steps."""
    losses = {}
    for number in among:
        config = config_of(width, init_std=std_of(width, transfer=transfer))
        model, optimizer = made(config, transfer=transfer)
        losses[number] = sum(train(model, optimizer(RATES[number]), 40)[-10:]) / 10
    return min(among, key=lambda n: losses[n] if math.isfinite(losses[n]) else math.inf)


def test_the_best_rate_of_a_narrow_model_is_that_of_a_wide_one():
    """Over 8 times the width: with transfer within a factor of 2, without it falls by 4 or more."""
    narrow = best_rate(32, transfer=True)
    assert 2 < narrow < len(RATES) - 2
    assert abs(best_rate(256, transfer=True, among=range(narrow - 2, narrow + 3)) - narrow) <= 1
    assert best_rate(256, transfer=False, among=range(narrow + 1)) <= narrow - 2
