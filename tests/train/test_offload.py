"""Activations that wait elsewhere: the same gradients, and every large one moved once."""

import torch
from tiny_training import TinySource, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from hanlin.train import CausalLM
from hanlin.train.choices import Recompute
from hanlin.train.offload import Offload
from hanlin.train.recompute import recompute_layers


def loss_of(model, batch):
    terms, _ = CausalLM().loss(model, batch)
    return terms[0][0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def saved_bytes(model, batch):
    """What one forward pass saves for its backward besides weights, 1 KiB and more: bytes of different storages."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights and min(t.numel() * t.element_size(), storage.nbytes()) >= 1024:
            seen[storage.data_ptr()] = storage  # held, so that no place is used twice
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss_of(model, batch)
    return sum(storage.nbytes() for storage in seen.values())


def test_gradients_are_bit_equal_and_every_large_activation_is_moved_once():
    model, batch = tiny_model(), TinySource(4).batch(0)
    expected, everything = gradients(model, loss_of(model, batch)), saved_bytes(model, batch)
    offload = Offload(model.parameters(), above=1024)
    with offload.saving():
        loss = loss_of(model, batch)
    assert offload.moved == everything > 100_000
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, loss), strict=True))


def test_weights_and_what_is_small_stay():
    model, batch = tiny_model(), TinySource(4).batch(0)
    offload = Offload(model.parameters(), above=1 << 20)
    with offload.saving():
        loss_of(model, batch)
    assert offload.moved == 0 and offload.kept > 0
    everything = Offload([], above=1024)
    with everything.saving():
        loss_of(model, batch)
    weights_aside = Offload(model.parameters(), above=1024)
    with weights_aside.saving():
        loss_of(model, batch)
    assert weights_aside.moved < everything.moved


def test_the_inputs_of_layers_that_run_again_are_moved_too():
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    expected = gradients(model, loss_of(model, batch))
    kept_all = Offload(model.parameters(), above=1024)
    with kept_all.saving():
        loss_of(model, batch)
    layers = recompute_layers(model, Recompute(kind="full"))
    offload = Offload(model.parameters(), above=1024)
    with offload.saving():
        loss = loss_of(model, batch)
    one_input = batch.ids.numel() * model.config.width * 8
    assert len(layers) * one_input <= offload.moved < kept_all.moved / 3
    for a, b in zip(expected, gradients(model, loss), strict=True):
        assert torch.equal(a, b)


def test_a_graph_that_is_kept_gives_its_tensors_twice():
    x = torch.randn(64, 64, requires_grad=True)
    with Offload([], above=0).saving():
        y = x.sin().exp().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
