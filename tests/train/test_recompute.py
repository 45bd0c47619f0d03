"""Layers that run again in the backward pass: the same gradients, bit for bit, for less memory."""

import copy

import pytest
import torch
from tiny_training import TinySource, tiny_model
from torch.autograd.profiler import profile

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, BucketPosition, ExpertsConfig, FeedForwardConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.balance import router_z_loss
from hanlin.nn.dropout import Dropout
from hanlin.nn.routing import RouterConfig
from hanlin.train.choices import Recompute
from hanlin.train.objective import document_mask
from hanlin.train.recompute import recompute_layers, remember_layers
from hanlin.train.token_loss import token_loss
from hanlin.tune.lora import add_lora

WAYS = [Recompute(kind="full"), Recompute(kind="layers"), Recompute(kind="operators")]


def run(model, batch):
    return model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None)


def gradients(model, batch, *, seed=0, extra=None):
    model.zero_grad()
    torch.manual_seed(seed)
    output = run(model, batch)
    loss = token_loss(model, output.hidden, batch.targets)
    (loss if extra is None else loss + extra(output)).backward()
    after = torch.rand(4)  # the random state that the rest of the step sees
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, output, after


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.kind)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_bit_equal(way, dtype):
    model = tiny_model().double() if dtype == torch.float64 else tiny_model()
    model.compute_dtype = dtype
    batch = TinySource(4).batch(0)
    expected, _, _ = gradients(model, batch)
    assert len(recompute_layers(model, way)) == (1 if way.kind == "layers" else 2)
    found, _, _ = gradients(model, batch)
    assert_same(found, expected)
    remember_layers(model)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def moe_model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "mixtral", depth=3, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        feed_forward=ExpertsConfig(32, 4, RouterConfig(2, jitter=0.1)), vocab_size=61, width=32,
    )  # fmt: skip
    return Transformer(config).double().train()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.kind)
def test_routing_is_noted_once_and_its_loss_has_its_gradient(way):
    """With jitter, so that a second pass with other random numbers would route and learn something else."""
    model, batch = moe_model(), TinySource(4).batch(0)

    def balance(output):
        return router_z_loss(output.routing)

    expected, _, chance = gradients(model, batch, extra=balance)
    recompute_layers(model, way)
    found, output, after = gradients(model, batch, extra=balance)
    assert len(output.routing) == 3
    assert_same(found, expected)
    assert torch.equal(chance, after)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.kind)
@pytest.mark.parametrize("own", [False, True])
def test_dropout_leaves_out_the_same_numbers_twice(way, own):
    """Of torch's generator, and of one that the module owns."""
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    generator = torch.Generator() if own else None
    for layer in model.model.layers:
        layer.mlp.dropout = Dropout(0.3, generator=generator)
    results = []
    for _ in range(2):
        if own:
            generator.manual_seed(7)
        results.append(gradients(model, batch)[0])
        state = generator.get_state() if own else None
        recompute_layers(model, way)
    assert_same(*results)
    if own:  # a later step goes on from the same place
        remember_layers(model)
        generator.manual_seed(7)
        gradients(model, batch)
        assert torch.equal(generator.get_state(), state)


def test_a_position_bias_that_layers_share_gets_its_whole_gradient():
    """Made in the first layer's pass, read by all of them."""
    torch.manual_seed(0)
    attention = AttentionConfig(heads=4, kv_heads=4, head_dim=8, position=BucketPosition(8, 16))
    config = ModelConfig.uniform(
        "t5", depth=3, attention=attention, feed_forward=FeedForwardConfig(48), vocab_size=61, width=32
    )
    model, batch = Transformer(config).double(), TinySource(4).batch(0)
    torch.nn.init.normal_(model.model.relative_bias.embedding.weight)
    expected, _, _ = gradients(model, batch)
    for way in WAYS:
        recompute_layers(model, way)
        assert_same(gradients(model, batch)[0], expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.kind)
def test_adapters_change_a_product_and_are_right(way, dora):
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    adapter = add_lora(model, rank=4, dora=dora)
    for branch in adapter.branches.values():
        torch.nn.init.normal_(branch.b.weight, std=0.1)
    expected, _, _ = gradients(model, batch)
    assert expected
    recompute_layers(model, way)
    assert_same(gradients(model, batch)[0], expected)


def test_a_kept_graph_can_go_backward_twice():
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    for way in WAYS:
        recompute_layers(model, way)
        loss, wanted = token_loss(model, run(model, batch).hidden, batch.targets), list(model.parameters())
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_copied_model_recomputes_with_its_own_layers():
    model = tiny_model().double()
    recompute_layers(model, WAYS[0])
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    batch = TinySource(4).batch(0)
    found = gradients(other, batch)[0]
    remember_layers(other)
    assert_same(gradients(other, batch)[0], found)


def bytes_after_forward(model, batch) -> int:
    """What a forward pass leaves allocated: the sum of the profiler's CPU memory events."""
    model.zero_grad(set_to_none=True)
    with profile(profile_memory=True) as record:
        kept = run(model, batch)
    del kept
    return sum(event.self_cpu_memory_usage for event in record.function_events)


def test_memory_of_activations_falls_in_the_order_of_the_ways():
    model, batch = tiny_model(), TinySource(64).batch(0)
    bytes_after_forward(model, batch)
    found = {"none": bytes_after_forward(model, batch)}
    for way in WAYS:
        recompute_layers(model, way)
        found[way.kind] = bytes_after_forward(model, batch)
    assert found["full"] < found["layers"] < found["none"], found
    assert found["full"] < found["operators"] < 0.8 * found["none"], found
    assert found["full"] < 0.25 * found["none"], found


def test_what_cannot_act_is_refused():
    with pytest.raises(HanlinError, match="fewer layers"):
        recompute_layers(tiny_model(), Recompute(kind="layers", every=3))
    with pytest.raises(ValueError, match="every acts with kind layers only"):
        Recompute(kind="full", every=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks, and hides it
def test_compiled_and_recomputed_gradients_agree_with_eager_ones():
    model, batch = tiny_model().double(), TinySource(4).batch(0)
    expected, _, _ = gradients(model, batch)
    for way in WAYS:
        torch.compiler.reset()
        recompute_layers(model, way)
        model.compile()
        for name, grad in gradients(model, batch)[0].items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12)
        model._compiled_call_impl = None
