"""A proof must be able to fail: each plausible mistake in the forward pass breaks the parity with transformers."""

from dataclasses import replace

import pytest
import torch
from tests.models.oracle import logits_of, make_oracle, save_theirs, some_ids

import hanlin.models.config as config_file
from hanlin.models import load_model
from hanlin.models.shared import Shared
from hanlin.nn.attention import Attention
from hanlin.nn.masks import Window


def forget(module: str):
    def mutate(model, _):
        for layer in model.model.layers:
            bias = layer.get_submodule(module).bias
            bias.data.zero_()

    return mutate


def forget_norm(which: str):
    def mutate(model, _):
        for layer in model.model.layers:
            layer.get_submodule(which).weight.data.fill_(1.0)

    return mutate


def shift_rope(model, monkeypatch):
    """Queries and keys turn by positions that are one apart: rotary positions are relative, so only a shift of one
    against the other can be seen, as when a cache counts from the wrong end."""
    original = Shared._tables

    def shifted(self, position, width):
        cos, sin = original(self, position, width)
        after, turned = original(replace(self, positions=self.positions + 1), position, width)
        middle = self.length // 2
        return (
            torch.cat([cos[:, :middle], after[:, middle:]], 1),
            torch.cat([sin[:, :middle], turned[:, middle:]], 1),
        )

    monkeypatch.setattr(Shared, "_tables", shifted)


def wrong_theta(model, monkeypatch):
    original = Shared._tables

    def other(self, position, width):
        return original(self, replace(position, theta=position.theta * 1.02), width)

    monkeypatch.setattr(Shared, "_tables", other)


def window_off_by(step: int):
    def mutate(model, monkeypatch):
        monkeypatch.setattr(config_file, "Window", lambda size: Window(size + step))

    return mutate


def no_qk_norm(model, _):
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = None


def wrong_scale(model, _):
    for layer in model.model.layers:
        attention: Attention = layer.self_attn
        attention.scores = replace(attention.scores, scale=model.config.width**-0.5)


def swap_gate_and_up(model, _):
    for layer in model.model.layers:
        gate, up = layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)


def wrong_eps(model, _):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-3


def untie(model, _):
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)


MUTANTS = {
    "no q bias": ("qwen2", forget("self_attn.q_proj")),
    "no k bias": ("qwen2", forget("self_attn.k_proj")),
    "no v bias": ("qwen2", forget("self_attn.v_proj")),
    "no output bias": ("llama-biases", forget("self_attn.o_proj")),
    "no gate bias": ("llama-biases", forget("mlp.gate_proj")),
    "no down bias": ("llama-biases", forget("mlp.down_proj")),
    "no q norm weight": ("qwen3", forget_norm("self_attn.q_norm")),
    "no k norm weight": ("qwen3", forget_norm("self_attn.k_norm")),
    "no QK norm at all": ("qwen3", no_qk_norm),
    "no input norm weight": ("llama", forget_norm("input_layernorm")),
    "RoPE shifted by one": ("llama", shift_rope),
    "RoPE of another base": ("llama", wrong_theta),
    "window one too wide": ("mistral", window_off_by(1)),
    "window one too narrow": ("mistral", window_off_by(-1)),
    "Qwen window one too wide": ("qwen2-windows", window_off_by(1)),
    "scale of the width": ("llama", wrong_scale),
    "gate and up swapped": ("llama", swap_gate_and_up),
    "another epsilon": ("llama", wrong_eps),
    "head not tied": ("qwen3-tied", untie),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_parity_check_fails_for(mutant, tmp_path, monkeypatch):
    name, mutate = MUTANTS[mutant]
    theirs = make_oracle(name)
    expected = logits_of(theirs, some_ids())
    sound = load_model(save_theirs(theirs, tmp_path))
    assert (logits_of(sound, some_ids()) - expected).abs().max() <= 2e-5
    mutated = load_model(tmp_path)
    mutate(mutated, monkeypatch)
    assert (logits_of(mutated, some_ids()) - expected).abs().max() > 1e-4  # five times past what parity allows
