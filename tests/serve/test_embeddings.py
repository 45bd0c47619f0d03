"""Texts as vectors, and how near they are."""

import base64
import math
import struct

import pytest
import torch
from tests.serve.tiny import post

TEXTS = ["The quick brown fox", "敏捷的棕色狐狸", "x"]


def test_vectors_are_the_mean_of_the_hidden_states(client, engine, folder):
    from transformers import AutoModel

    answer = client.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64
    model = AutoModel.from_pretrained(folder).eval()
    for text, one in zip(TEXTS, answer.data, strict=True):
        ids = torch.tensor([engine.tokenizer.prompt(text)])
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model(ids).last_hidden_state[0].mean(0), dim=0)
        assert torch.allclose(torch.tensor(one.embedding), expected, atol=1e-4)
    assert answer.usage.prompt_tokens == sum(len(engine.tokenizer.prompt(text)) for text in TEXTS)


def test_forms_agree(address, engine):
    def vectors(**changes):
        response = post(address, "/v1/embeddings", {"input": TEXTS} | changes)
        return [one["embedding"] for one in response.json()["data"]]

    plain = vectors()
    coded = [struct.unpack(f"<{len(plain[0])}f", base64.b64decode(text)) for text in vectors(encoding_format="base64")]
    ids = vectors(input=[engine.tokenizer.prompt(text) for text in TEXTS])
    assert all(
        math.isclose(a, b, abs_tol=1e-6) for x, y in zip(plain, coded, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert all(
        math.isclose(a, b, abs_tol=1e-5) for x, y in zip(plain, ids, strict=True) for a, b in zip(x, y, strict=True)
    )
    short = vectors(dimensions=5)[0]
    scale = math.hypot(*plain[0][:5])
    assert [value / scale for value in plain[0][:5]] == pytest.approx(short, abs=1e-5)
    assert vectors(input=TEXTS[0])[0] == pytest.approx(plain[0], abs=1e-5)


def test_scores_are_cosines_and_the_best_comes_first(address):
    vectors = torch.tensor(
        [one["embedding"] for one in post(address, "/v1/embeddings", {"input": TEXTS}).json()["data"]]
    )
    cosines = (vectors[1:] @ vectors[0]).tolist()
    many = post(address, "/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
    assert [one["score"] for one in many["data"]] == pytest.approx(cosines, abs=1e-5)
    pairs = post(address, "/v1/score", {"text_1": [TEXTS[0]] * 2, "text_2": TEXTS[1:]}).json()
    assert [one["score"] for one in pairs["data"]] == pytest.approx(cosines, abs=1e-5)
    ranked = post(address, "/rerank", {"query": TEXTS[0], "documents": [TEXTS[1], {"text": TEXTS[2]}]}).json()
    assert [one["relevance_score"] for one in ranked["results"]] == pytest.approx(sorted(cosines)[::-1], abs=1e-5)
    assert all(one["document"]["text"] == TEXTS[1:][one["index"]] for one in ranked["results"])
    best = {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 1, "return_documents": False}
    [only] = post(address, "/v1/rerank", best).json()["results"]
    assert only["relevance_score"] == pytest.approx(max(cosines), abs=1e-5) and "document" not in only


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [1.5]}, "input"),
        ("/v1/embeddings", {"input": [10**9]}, "input"),
        ("/v1/embeddings", {"input": "fox " * 5000}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 10**6}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/score", {"text_1": "", "text_2": "a"}, "text_1"),
    ],
)
def test_mistakes_are_named(address, path, body, param):
    response = post(address, path, body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
