"""Which precision is taken, and that a model is given back as it was."""

import pytest
import torch
from tiny_training import tiny_model

from hanlin.core.device import choose_dtype
from hanlin.core.errors import HanlinError
from hanlin.train.choices import Offload, Recompute
from hanlin.train.precision import Precision, tf32_products, training_mode
from hanlin.train.recompute import Recomputed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "products", "scales"),
    [
        ("fp32", None, None, False),
        ("bf16", torch.bfloat16, torch.bfloat16, False),
        ("fp16", torch.float16, None, True),
    ],
)
def test_a_named_precision_is_what_it_says(name, dtype, products, scales):
    found = Precision.choose(name, CPU)
    assert (found.name, found.compute_dtype, found.products, found.scales_loss) == (name, dtype, products, scales)
    assert choose_dtype(name, CPU) == (dtype or torch.float32)


def test_auto_is_one_of_those_that_need_no_scale():
    assert Precision.choose("auto", CPU).name in ("fp32", "bf16")


def test_what_the_device_cannot_do_is_refused_by_name():
    with pytest.raises(HanlinError, match="fp8 needs a GPU with 8-bit"):
        Precision.choose("fp8", CPU)
    with pytest.raises(HanlinError, match=r"train\.tf32 is for NVIDIA GPUs"):
        Precision.choose("fp32", CPU, tf32=True)
    with pytest.raises(HanlinError, match="auto, fp32, bf16, fp16, fp8"):
        Precision.choose("fp4", CPU)


def test_tf32_is_switched_and_put_back():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.fp32_precision
    with tf32_products(True):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.fp32_precision == "tf32"
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.fp32_precision) == before
    with tf32_products(False):
        assert torch.backends.cuda.matmul.fp32_precision == before[0]


def test_activations_wait_elsewhere_where_asked_and_compiled_code_refuses():
    model, ids = tiny_model(), torch.arange(12)[None]
    kept = []
    for offload in (None, Offload(above=0)):
        with training_mode(model, precision=Precision("fp32"), offload=offload):
            for _ in range(2):  # micro-batches
                model(ids).logits.square().sum().backward()
            kept.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    with (
        pytest.raises(HanlinError, match=r"one of train\.offload and train\.compile"),
        training_mode(model, precision=Precision("fp32"), offload=Offload(), compile=True),
    ):
        pass


def test_a_model_is_given_back_as_it_was_also_after_an_error():
    model = tiny_model().eval()
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    with (
        pytest.raises(KeyError),
        training_mode(model, precision=Precision("fp16"), recompute=Recompute(kind="full")),
    ):
        assert model.training and model(ids).logits.dtype == torch.float16
        assert all(isinstance(layer.forward, Recomputed) for layer in model.model.layers)
        model(ids).logits.float().sum().backward()
        raise KeyError
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(model(ids).logits, expected)
    assert all("forward" not in vars(layer) for layer in model.model.layers)
