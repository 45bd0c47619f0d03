"""LoRA adapters over HTTP: loaded, named as a model, bound to keys, let go."""

import httpx
import pytest
import torch
from tests.serve.tiny import post, serving

from hanlin.engine import Engine
from hanlin.models import load_model
from hanlin.serve.limits import Key
from hanlin.tune import add_lora, save_lora

ASK = {
    "messages": [{"role": "user", "content": "敏捷的 fox？"}],
    "temperature": 0,
    "max_tokens": 20,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def root(folder, tmp_path_factory):
    """A folder with one adapter, and beside it one that is not for clients."""
    place = tmp_path_factory.mktemp("adapters")
    model = load_model(folder)
    adapter = add_lora(model, rank=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for branch in adapter.branches.values():
            branch.b.weight.copy_(torch.randn(branch.b.weight.shape, generator=generator))
    save_lora(adapter, place / "open" / "poet")
    save_lora(adapter, place / "secret")
    return place / "open"


@pytest.fixture
def engine(folder):
    with Engine.from_folder(folder) as engine:
        yield engine


def say(address, model, **more) -> httpx.Response:
    return post(address, "/v1/chat/completions", ASK | {"model": model}, **more)


def text(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_an_adapter_comes_answers_and_goes(engine, root):
    with serving({"tiny": engine}, adapter_root=root) as address:
        plain = text(say(address, "tiny"))
        assert say(address, "诗人").status_code == 404
        loaded = post(address, "/v1/load_lora_adapter", {"lora_name": "诗人", "lora_path": "poet"})
        assert loaded.status_code == 200 and loaded.json()["parent"] == "tiny"
        assert [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]] == ["tiny", "诗人"]
        assert text(say(address, "诗人")) != plain == text(say(address, "tiny"))
        assert 'running_lora_adapters="诗人"' in httpx.get(f"{address}/metrics").text
        assert post(address, "/v1/embeddings", {"input": "a", "model": "诗人"}).status_code == 400
        twice = post(address, "/v1/load_lora_adapter", {"lora_name": "诗人", "lora_path": "poet"})
        assert twice.status_code == 400 and twice.json()["error"]["param"] == "lora_name"
        again = {"lora_name": "诗人", "lora_path": "poet", "load_inplace": True}
        assert post(address, "/v1/load_lora_adapter", again).status_code == 200
        assert post(address, "/v1/unload_lora_adapter", {"lora_name": "诗人"}).json()["deleted"]
        assert say(address, "诗人").status_code == 404
        assert post(address, "/v1/unload_lora_adapter", {"lora_name": "诗人"}).status_code == 404


@pytest.mark.parametrize("path", ["../secret", "/etc", "none", ".", "poet/../../secret", "a\0b"])
def test_only_adapters_below_the_root_are_read(engine, root, path):
    with serving({"tiny": engine}, adapter_root=root) as address:
        response = post(address, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert response.status_code == 400, response.text
        assert engine.adapters() == []


def test_without_a_root_nothing_is_loaded(engine, root):
    engine.load_adapter("poet", root / "poet")  # by whoever runs the server
    with serving({"tiny": engine}) as address:
        refused = post(address, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(root / "poet")})
        assert refused.status_code == 403 and "--adapter-root" in refused.json()["error"]["message"]
        assert post(address, "/v1/unload_lora_adapter", {"lora_name": "poet"}).status_code == 403
        assert say(address, "poet").status_code == 200


def test_a_key_may_be_bound_to_its_adapters(engine, root):
    engine.load_adapter("poet", root / "poet")
    keys = [Key("a", "alice", adapters=()), Key("b", "bob", adapters=("poet",)), Key("c", "carol")]
    with serving({"tiny": engine}, keys=keys, adapter_root=root) as address:
        for key, allowed in (("a", False), ("b", True), ("c", True)):
            headers = {"Authorization": f"Bearer {key}"}
            assert say(address, "poet", headers=headers).status_code == (200 if allowed else 404)
            listed = [m["id"] for m in httpx.get(f"{address}/v1/models", headers=headers).json()["data"]]
            assert listed == (["tiny", "poet"] if allowed else ["tiny"])
        bound = post(address, "/v1/unload_lora_adapter", {"lora_name": "poet"}, headers={"Authorization": "Bearer b"})
        assert bound.status_code == 403
