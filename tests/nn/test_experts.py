"""Mixture of experts against a loop over tokens and experts, and against the blocks of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nn.lifting import lifted
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hanlin.core.errors import HanlinError
from hanlin.nn.activations import activation, clamped_swiglu
from hanlin.nn.experts import Dispatch, Experts, MixtureOfExperts
from hanlin.nn.grouped import grouped_outer, grouped_product
from hanlin.nn.routing import RouterConfig, Routing

WIDTH, HIDDEN = 8, 12

BLOCKS: dict[str, dict[str, Any]] = {
    "softmax": {"router": RouterConfig(2)},
    "fine-grained": {"count": 16, "router": RouterConfig(6, renormalise=False, scale=2.5)},
    "all experts": {"count": 4, "router": RouterConfig(4)},
    "biases": {"router": RouterConfig(2, kind="topk_softmax", bias=True), "bias": True, "limit": 1.5},
    "plain": {"router": RouterConfig(1, renormalise=False), "activation": "relu", "gated": False},
    "plain with biases": {"router": RouterConfig(2), "activation": "gelu", "gated": False, "bias": True},
    "scaled input": {"router": RouterConfig(1, kind="sigmoid", renormalise=False), "scale_input": True},
    "scaled input, biases": {"router": RouterConfig(2, kind="sigmoid"), "scale_input": True, "bias": True},
    "shared": {"router": RouterConfig(2, kind="sigmoid", correction=True), "shared_hidden": 5},
    "shared, gated": {"router": RouterConfig(2), "shared_hidden": 5, "shared_gate": True},
    "capacity": {"router": RouterConfig(1, renormalise=False, capacity=1)},
    "capacity for two": {"router": RouterConfig(2, capacity_factor=0.6), "bias": True},
    "capacity, scaled input": {"router": RouterConfig(2, capacity=2), "scale_input": True},
}


def build(name: str, *, seed: int = 0, **changes: Any) -> MixtureOfExperts:
    torch.manual_seed(seed)
    settings = {"count": 6} | BLOCKS[name] | changes
    block = MixtureOfExperts(WIDTH, HIDDEN, **settings).double()
    redraw(block)
    return block


@torch.no_grad()
def redraw(module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.normal_(0.0, 0.6)


def by_hand(block: MixtureOfExperts, x: Tensor) -> Tensor:
    """One token and one expert at a time. x (rows, T, width)."""
    experts, gated = block.experts, hasattr(block.experts, "gate_up_proj")
    name = "gate_up_proj" if gated else "up_proj"
    first, first_bias = getattr(experts, name), getattr(experts, f"{name}_bias")
    settings = BLOCKS[NAME_OF[id(block)]]
    function = activation(settings.get("activation", "silu"))
    routing = block.router(x)
    out = []
    for t, token in enumerate(x.flatten(0, 1)):
        total = torch.zeros_like(token)
        for j, e in enumerate(routing.experts[t].tolist()):
            if routing.kept is not None and not routing.kept[t, j]:
                continue
            weight = routing.weights[t, j]
            h = first[e] @ (token * weight if experts.scale_input else token)
            h = h if first_bias is None else h + first_bias[e]
            if settings.get("limit"):
                h = clamped_swiglu(h[:HIDDEN], h[HIDDEN:], limit=settings["limit"])
            else:
                h = function(h[:HIDDEN]) * h[HIDDEN:] if gated else function(h)
            y = experts.down_proj[e] @ h
            y = y if experts.down_proj_bias is None else y + experts.down_proj_bias[e]
            total = total + (y if experts.scale_input else weight * y)
        if block.shared is not None:
            s = block.shared
            y = s.down_proj.weight @ (F.silu(s.gate_proj.weight @ token) * (s.up_proj.weight @ token))
            gate = 1.0 if block.shared_gate is None else torch.sigmoid(block.shared_gate.weight @ token)
            total = total + gate * y
        out.append(total)
    return torch.stack(out).view_as(x)


NAME_OF: dict[int, str] = {}


def assert_by_hand(name: str, block: MixtureOfExperts, x: Tensor, tolerance: float = 1e-10) -> None:
    NAME_OF[id(block)] = name
    inputs = [x.requires_grad_(), *block.parameters()]
    ours, expected = block(x), by_hand(block, x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected, rtol=0, atol=tolerance)
    direction = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, direction, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, direction, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b.expand_as(a).to(a.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 1)])
def test_the_block_equals_a_loop(name, shape):
    assert_by_hand(name, build(name), torch.randn(*shape, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("name", ["softmax", "biases", "plain with biases", "scaled input", "capacity for two"])
def test_the_grouped_product_of_torch_equals_the_loop_in_fp32(name):
    block = build(name).float()
    assert_by_hand(name, block, torch.randn(2, 9, WIDTH), tolerance=2e-4)


@pytest.mark.parametrize("name", ["softmax", "biases", "scaled input", "capacity"])
def test_it_passes_gradcheck(name):
    block = build(name)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = dict(block.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_to_one_expert_and_the_others_get_exact_zeros(dtype):
    block = build("softmax", router=RouterConfig(1)).to(dtype)
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.weight[3] = 5.0
    x = torch.rand(2, 5, WIDTH, dtype=dtype)
    assert_by_hand("softmax", block, x, 1e-10 if dtype == torch.float64 else 2e-4)
    notes: list[Routing] = []
    block(x, notes).sum().backward()
    assert notes[0].experts.unique().tolist() == [3]
    for p in (block.experts.gate_up_proj, block.experts.down_proj):
        assert p.grad[3].abs().min() > 0
        assert not p.grad[[0, 1, 2, 4, 5]].any()


def test_no_tokens_give_no_tokens():
    block = build("softmax")
    x = torch.zeros(2, 0, WIDTH, dtype=torch.float64, requires_grad=True)
    assert block(x).shape == (2, 0, WIDTH)
    block(x).sum().backward()


def test_dropped_tokens_get_zeros_from_the_experts():
    block = build("capacity")
    notes: list[Routing] = []
    out = block(torch.randn(2, 9, WIDTH, dtype=torch.float64), notes)
    dropped = ~notes[0].kept[:, 0]
    assert 0 < dropped.sum() < 18
    assert not out.flatten(0, 1)[dropped].any()
    assert out.flatten(0, 1)[~dropped].any(-1).all()


def test_the_order_of_tokens_does_not_matter():
    block = build("fine-grained")
    x = torch.randn(1, 11, WIDTH, dtype=torch.float64)
    order = torch.randperm(11)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["experts", "router", "input"])
def test_a_frozen_part_gets_no_gradient_and_the_others_keep_theirs(frozen):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)

    def gradients(block, x):
        block(x).square().sum().backward()
        return {"input": x.grad} | {n: p.grad for n, p in block.named_parameters()}

    whole = gradients(build("biases"), x.clone().requires_grad_())
    block = build("biases")
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    partly = gradients(block, x.clone().requires_grad_(frozen != "input"))
    for name, expected in whole.items():
        if name.startswith(frozen):
            assert partly[name] is None
        else:
            torch.testing.assert_close(partly[name], expected, rtol=0, atol=1e-12)


def test_master_weights_in_fp32_work_with_bf16_activations():
    block = build("shared, gated").float()
    x = torch.randn(2, 6, WIDTH)
    low = block(x.bfloat16())
    low.sum().backward()
    assert low.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}
    torch.testing.assert_close(low.float(), block(x.bfloat16().float()), rtol=0.05, atol=0.2)


def test_many_experts_a_token_are_added_up_in_fp32():
    """The sum of 64 rows in bf16 is off by one rounding, not by 64."""
    torch.manual_seed(0)
    rows = torch.rand(64, 256).bfloat16()
    routing = Routing(torch.ones(1, 64), torch.arange(64)[None], torch.zeros(1, 64), torch.zeros(1, 64))
    total = Dispatch.of(routing, 64).combine(rows)
    expected = rows.double().sum(0)
    assert ((total[0].double() - expected) / expected).abs().max() <= 2**-8


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (4, {"router": RouterConfig(5)}, "5 experts"),
        (6, {"router": RouterConfig(1, groups=4, top_groups=2)}, "4 equal groups"),
        (4, {"router": RouterConfig(1, groups=4, top_groups=2, group_score="top2")}, "two at least"),
        (4, {"router": RouterConfig(1), "shared_gate": True}, "shared_hidden"),
        (4, {"router": RouterConfig(1), "activation": "sylu"}, "silu"),
        (4, {"router": RouterConfig(1), "activation": "relu", "gated": False, "limit": 7.0}, "limit"),
    ],
)
def test_what_cannot_be_built_is_refused(count, settings, message):
    with pytest.raises(HanlinError, match=message):
        MixtureOfExperts(WIDTH, HIDDEN, count, **settings)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 5, 0], [8, 0, 0, 0], [1]])
@pytest.mark.parametrize(
    ("dtype", "widths"), [(torch.float64, (4, 8)), (torch.float32, (4, 8)), (torch.float32, (3, 5))]
)
def test_grouped_products_equal_products_of_each_group(counts, dtype, widths):
    """fp32 with rows of 16 bytes' multiple: torch's; the others: padded."""
    torch.manual_seed(0)
    n, (a, b) = sum(counts), widths
    x, y, weight = (torch.randn(*s, dtype=dtype) for s in ((n, a), (n, b), (len(counts), a, b)))
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    parts, others = x.split(counts), y.split(counts)
    expected = torch.cat([p @ w for p, w in zip(parts, weight, strict=True)])
    torch.testing.assert_close(grouped_product(x, weight, offsets), expected, rtol=0, atol=tolerance)
    outer = torch.stack([p.T @ q for p, q in zip(parts, others, strict=True)])
    torch.testing.assert_close(grouped_outer(x, y, offsets), outer, rtol=0, atol=tolerance)


# ---- the blocks of transformers -------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Theirs:
    """build: their block, whose weights are redrawn; ours: our block; names: our tensors from theirs, gradients too."""

    build: Callable[[], nn.Module]
    ours: Callable[[], MixtureOfExperts]
    names: Callable[[Tensors], Tensors]


def plain_names(theirs: Tensors, *, gate: str = "gate", shared: str = "shared_experts") -> Tensors:
    table = {f"{gate}.weight": "router.weight", f"{gate}.e_score_correction_bias": "router.correction"}
    table |= {f"{shared}.{p}_proj.weight": f"shared.{p}_proj.weight" for p in ("gate", "up", "down")}
    table |= {"shared_expert_gate.weight": "shared_gate.weight"}
    return {table.get(name, name): tensor for name, tensor in theirs.items()}


def llama4_names(theirs: Tensors) -> Tensors:
    names = plain_names(theirs, gate="router", shared="shared_expert")
    return {n: t.transpose(1, 2) if n.startswith("experts.") else t for n, t in names.items()}


def gpt_oss_names(theirs: Tensors) -> Tensors:
    names = {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in theirs.items()}
    for name in ("experts.gate_up_proj", "experts.gate_up_proj_bias"):  # theirs: gate and up take turns
        names[name] = torch.cat([names[name][:, ::2], names[name][:, 1::2]], 1)
    return names


def switch_names(theirs: Tensors) -> Tensors:
    up, down = (torch.stack([theirs[f"experts.expert_{e}.{n}.weight"] for e in range(6)]) for n in ("wi", "wo"))
    router = {n.replace("classifier.", ""): t for n, t in theirs.items() if n.startswith("router")}
    return router | {"experts.up_proj": up, "experts.down_proj": down}


def theirs(config_class: Any, block_class: Any, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = config_class(hidden_size=WIDTH, **settings)
        config._experts_implementation = "eager"
        return block_class(config)

    return make


def ours(count: int, router: RouterConfig, **settings: Any) -> Callable[[], MixtureOfExperts]:
    return lambda: MixtureOfExperts(WIDTH, HIDDEN, count, router, **settings)


SIZES = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
DEEP = {
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": HIDDEN,
    "n_shared_experts": 2,
    "n_routed_experts": 12,
}
SWITCH = {"d_model": WIDTH, "d_ff": HIDDEN, "num_experts": 6, "dropout_rate": 0.0, "router_jitter_noise": 0.0}


def switch(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: SwitchTransformersSparseMLP(SwitchTransformersConfig(**SWITCH | settings))


PARITY = {
    "Mixtral": Theirs(
        theirs(
            MixtralConfig, MixtralSparseMoeBlock, num_local_experts=6, num_experts_per_tok=2, intermediate_size=HIDDEN
        ),
        ours(6, RouterConfig(2)),
        plain_names,
    ),
    "Qwen2-MoE": Theirs(
        theirs(
            Qwen2MoeConfig, Qwen2MoeSparseMoeBlock, shared_expert_intermediate_size=5, norm_topk_prob=False, **SIZES
        ),
        ours(6, RouterConfig(2, renormalise=False), shared_hidden=5, shared_gate=True),
        lambda names: plain_names(names, shared="shared_expert"),
    ),
    "Qwen2-MoE, renormalised": Theirs(
        theirs(Qwen2MoeConfig, Qwen2MoeSparseMoeBlock, shared_expert_intermediate_size=5, norm_topk_prob=True, **SIZES),
        ours(6, RouterConfig(2), shared_hidden=5, shared_gate=True),
        lambda names: plain_names(names, shared="shared_expert"),
    ),
    "Qwen3-MoE": Theirs(
        theirs(Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, norm_topk_prob=True, **SIZES),
        ours(6, RouterConfig(2)),
        plain_names,
    ),
    "Qwen3-MoE, not renormalised": Theirs(
        theirs(Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, norm_topk_prob=False, **SIZES),
        ours(6, RouterConfig(2, renormalise=False)),
        plain_names,
    ),
    "DeepSeek-V2, greedy": Theirs(
        theirs(DeepseekV2Config, DeepseekV2Moe, topk_method="greedy", routed_scaling_factor=1.7, **DEEP),
        ours(12, RouterConfig(3, renormalise=False, scale=1.7, wide=True), shared_hidden=2 * HIDDEN),
        plain_names,
    ),
    "DeepSeek-V2, groups": Theirs(
        theirs(
            DeepseekV2Config,
            DeepseekV2Moe,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            **DEEP,
        ),
        ours(
            12,
            RouterConfig(3, renormalise=False, scale=1.7, wide=True, groups=4, top_groups=2),
            shared_hidden=2 * HIDDEN,
        ),
        plain_names,
    ),
    "DeepSeek-V3": Theirs(
        theirs(
            DeepseekV3Config,
            DeepseekV3MoE,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            **DEEP,
        ),
        ours(
            12,
            RouterConfig(
                3, kind="sigmoid", scale=2.5, wide=True, groups=3, top_groups=2, group_score="top2", correction=True
            ),
            shared_hidden=2 * HIDDEN,
        ),
        plain_names,
    ),
    "Llama 4": Theirs(
        theirs(Llama4TextConfig, Llama4TextMoe, num_local_experts=6, num_experts_per_tok=1, intermediate_size=HIDDEN),
        ours(6, RouterConfig(1, kind="sigmoid", renormalise=False), shared_hidden=HIDDEN, scale_input=True),
        llama4_names,
    ),
    "gpt-oss": Theirs(
        theirs(
            GptOssConfig,
            GptOssMLP,
            num_local_experts=6,
            num_experts_per_tok=2,
            intermediate_size=HIDDEN,
            swiglu_limit=1.5,
        ),
        ours(6, RouterConfig(2, kind="topk_softmax", bias=True), bias=True, limit=1.5),
        gpt_oss_names,
    ),
    "Switch": Theirs(
        switch(expert_capacity=2),
        ours(6, RouterConfig(1, renormalise=False, wide=True, capacity=2), activation="relu", gated=False),
        switch_names,
    ),
    "Switch, bias": Theirs(
        switch(expert_capacity=64, router_bias=True, dense_act_fn="gelu"),
        ours(6, RouterConfig(1, renormalise=False, wide=True, capacity=64, bias=True), activation="gelu", gated=False),
        switch_names,
    ),
}


def pair(name: str) -> tuple[nn.Module, MixtureOfExperts]:
    """Their block with redrawn weights, and ours with the same, in fp64."""
    torch.manual_seed(3)
    reference = PARITY[name].build().double()
    redraw(reference)
    block = PARITY[name].ours().double()
    state = PARITY[name].names({n: t.detach() for n, t in reference.state_dict().items()})
    block.load_state_dict({n: t.clone() for n, t in state.items()}, strict=True)
    return reference, block


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x)
    return (out[0] if isinstance(out, tuple) else out).view(x.shape)


@pytest.mark.parametrize("name", PARITY)
def test_the_block_equals_that_of_transformers(name):
    """fp64, their fp32 casts lifted: 1e-10, forward and the gradient of each weight and of the input."""
    reference, block = pair(name)
    x = torch.randn(3, 10, WIDTH, dtype=torch.float64)
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    with lifted():
        if hasattr(reference, "router") and hasattr(reference.router, "dtype"):
            reference.router.dtype = torch.float64  # Switch reads its router's dtype from the config
        expected = output_of(reference, theirs_x)
    out = block(ours_x)
    assert expected.std() > 0.5
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=0, atol=1e-10)
    wanted = PARITY[name].names(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    )
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[parameter_name], rtol=0, atol=1e-10, msg=parameter_name)


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.03)])
def test_the_block_equals_theirs_in_the_precision_they_have(name, dtype, bound):
    """Nothing lifted. bf16: their weights and inputs as they are, relative to the spread of the output."""
    reference, block = pair(name)
    x = torch.randn(3, 10, WIDTH).to(dtype)
    with torch.no_grad():
        expected = output_of(reference.to(dtype), x)
        out = block.to(dtype)(x)
    assert out.dtype == dtype
    gap = (out.float() - expected.float()).flatten(0, 1).abs().amax(-1) / expected.float().std()
    assert gap.median() <= bound
    if dtype == torch.float32:
        assert gap.max() <= bound
    else:  # a token whose choice hangs on one rounding may go elsewhere
        assert (gap > 0.15).sum() <= 2


def test_experts_alone_take_any_routing():
    torch.manual_seed(0)
    experts = Experts(WIDTH, HIDDEN, 3).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    routing = Routing(
        torch.tensor([[0.5, 2.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([[2, 0], [1, 1]]),
        torch.zeros(2, 3), torch.zeros(2, 3),
    )  # fmt: skip

    def one(e: int, t: int) -> Tensor:
        gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
        return experts.down_proj[e] @ (F.silu(gate) * up)

    expected = torch.stack([0.5 * one(2, 0) + 2.0 * one(0, 0), one(1, 1)])
    torch.testing.assert_close(experts(x, routing), expected, rtol=0, atol=1e-12)
