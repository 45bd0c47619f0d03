"""`hanlin generate` beyond drawing: searches, prescribed forms, penalties, speculation, adapters."""

import json
import re

import pytest
from tests.cli.test_generate_chat import expected, folder, run  # noqa: F401 (fixtures)

from hanlin.engine import Engine, SamplingParams
from hanlin.models import load_model
from hanlin.tune import add_lora, save_lora

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--dtype", "float32", "--quiet"]


def written(capfd, folder, *flags: str) -> str:  # noqa: F811
    code, out, err = run(capfd, "generate", str(folder), "The quick", *GREEDY, *flags)
    assert code == 0, err
    return out.removesuffix("\n")


def test_beams_print_the_best(folder, capfd):  # noqa: F811
    out = written(capfd, folder, "--beams", "4", "--n", "2", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    params = SamplingParams(temperature=0, max_tokens=12, beams=4, n=2)
    with Engine.from_folder(folder, dtype="float32") as engine:
        want = engine.generate("The quick", params)
    assert [line["token_ids"] for line in lines] == [c.token_ids for c in want]
    assert lines[0]["score"] >= lines[1]["score"]


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [(["--regex", "(狗|cat)+!"], "(狗|cat)+!?.*"), (["--choice", "是", "--choice", "no"], "是|no")],
)
def test_the_output_has_the_form_that_was_asked_for(folder, capfd, flags, pattern):  # noqa: F811
    assert re.fullmatch(pattern, written(capfd, folder, *flags, "--max-tokens", "40"))


def test_a_json_schema_is_read_from_a_file(folder, capfd, tmp_path):  # noqa: F811
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                                  "additionalProperties": False}))  # fmt: skip
    out = written(capfd, folder, "--json-schema", str(schema), "--max-tokens", "200")
    assert json.loads(out)["a"] in (1, 2)
    code, _, err = run(capfd, "generate", str(folder), "x", "--json-schema", str(tmp_path / "none.json"))
    assert (code, "none.json" in err) == (2, True)


def test_speculation_and_contrast_change_what_they_should(folder, capfd):  # noqa: F811
    plain = written(capfd, folder)
    assert written(capfd, folder, "--speculate", "ngram") == plain
    assert written(capfd, folder, "--draft", str(folder)) == plain
    assert written(capfd, folder, "--contrast", "0.8", "--top-k", "5") != plain
    long = ["--max-tokens", "120", "--ignore-eos"]
    flags = ["--frequency-penalty", "2", "--presence-penalty", "2", "--dry", "3"]
    assert written(capfd, folder, *long, *flags) != written(capfd, folder, *long)


def test_an_adapter_is_added(folder, capfd, tmp_path):  # noqa: F811
    model = load_model(folder)
    adapter = add_lora(model, rank=4)
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.5)
    save_lora(adapter, tmp_path / "lora")
    assert written(capfd, folder, "--adapter", str(tmp_path / "lora")) != written(capfd, folder)
