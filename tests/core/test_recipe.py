"""Recipes: file and flags meet one check; whatever is wrong is told its place and its neighbour."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from hanlin.core.errors import HanlinError
from hanlin.core.recipe import Recipe, Section


class Adam(Section):
    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Annotated[float, Field(ge=0)] = 0.1


class Muon(Section):
    kind: Literal["muon"] = "muon"
    momentum: float = 0.95


class Lora(Section):
    rank: Annotated[int, Field(gt=0)] = 8


class Loop(Section):
    steps: Annotated[int | None, Field(gt=0, description="optimizer steps")] = None
    epochs: float | None = None
    lr: Annotated[float, Field(gt=0, description="peak rate", examples=[3e-4])] = 1e-3
    optimizer: Annotated[Adam | Muon, Field(discriminator="kind")] = Adam()
    compile: bool = False
    device: Literal["auto", "cpu"] = "auto"

    @model_validator(mode="after")
    def _one_length(self) -> "Loop":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self


class Shard(Section):
    path: Path
    weight: float = 1.0


class Demo(Recipe):
    """A demonstration."""

    name: str
    train: Loop = Loop(steps=10, optimizer=Adam(decay=0.3))
    shards: list[Shard] = Field(default_factory=list)
    files: list[Path] = Field(default_factory=list)
    mixture: dict[str, float] = Field(default_factory=dict)
    lora: Lora | None = None


def load(tmp_path: Path, text: str = "name: demo\n", *argv: str) -> Demo:
    file = tmp_path / "demo.yaml"
    file.write_text(text, encoding="utf-8")
    return Demo.load(file, argv, usage="hanlin demo RECIPE")


def mistake(tmp_path: Path, text: str = "name: demo\n", *argv: str) -> str:
    with pytest.raises(HanlinError) as caught:
        load(tmp_path, text, *argv)
    return str(caught.value).replace(str(tmp_path) + "/", "")


# --- what works


def test_a_section_that_is_mentioned_keeps_the_recipes_defaults(tmp_path):
    recipe = load(tmp_path, "name: demo\ntrain:\n  lr: 2e-3\n")
    assert (recipe.train.lr, recipe.train.steps, recipe.train.optimizer) == (2e-3, 10, Adam(decay=0.3))
    assert load(tmp_path, "name: demo\n", "--train.optimizer.betas", "0.8", "0.9").train.optimizer == Adam(
        betas=(0.8, 0.9), decay=0.3
    )


def test_flags_override_the_file(tmp_path):
    text = "name: demo\ntrain: {lr: 0.1, optimizer: {kind: adam, decay: 0.5}}\nshards: [{path: a}, {path: b}]\n"
    recipe = load(
        tmp_path,
        text,
        *("--name", "三", "--train.lr=5e-4", "--train.compile", "--train.device", "cpu", "--shards.1.weight", "3"),
        *("--files", "a.json", "数据.json", "--mixture.zh", "0.5", "--mixture.en", "0.5", "--lora.rank", "4"),
    )
    assert recipe.name == "三"
    assert (recipe.train.lr, recipe.train.compile, recipe.train.device) == (5e-4, True, "cpu")
    assert recipe.train.optimizer == Adam(decay=0.5)
    assert recipe.shards == [Shard(path=Path("a")), Shard(path=Path("b"), weight=3)]
    assert recipe.files == [Path("a.json"), Path("数据.json")]
    assert recipe.mixture == {"zh": 0.5, "en": 0.5}
    assert recipe.lora == Lora(rank=4)


def test_kind_changes_the_variant_and_drops_the_others_keys(tmp_path):
    text = "name: demo\ntrain: {optimizer: {kind: adam, decay: 0.5}}\n"
    for argv in (["--train.optimizer.kind", "muon"], ["--train.optimizer.kind=muon"]):
        recipe = load(tmp_path, text, "--train.optimizer.momentum", "0.8", *argv)
        assert recipe.train.optimizer == Muon(momentum=0.8)
    assert load(tmp_path, "name: demo\ntrain: {optimizer: {momentum: 0.7}}").train.optimizer == Muon(momentum=0.7)


@pytest.mark.parametrize("flag", ["--no-train.compile", "--train.no-compile", "--train.compile=false"])
def test_a_switch_can_be_turned_off(tmp_path, flag):
    assert load(tmp_path, "name: demo\ntrain: {compile: true}\n", flag).train.compile is False


def test_none_tables_and_lists_as_yaml(tmp_path):
    text = "name: demo\nlora: {rank: 2}\ntrain: {epochs: 2}\n"
    recipe = load(tmp_path, text, "--lora", "None", "--train.steps", "null", "--shards", "[{path: q, weight: 2}]")
    assert recipe.lora is None
    assert recipe.train.steps is None
    assert recipe.shards == [Shard(path=Path("q"), weight=2)]


def test_flags_alone_make_a_recipe():
    assert Demo.load(None, ["--name", "x"]) == Demo(name="x")


@given(
    name=st.text(min_size=1),
    lr=st.floats(min_value=1e-12, max_value=1e6),
    mixture=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    files=st.lists(st.from_regex(r"[\w ./-]+", fullmatch=True).map(Path)),
    optimizer=st.sampled_from([Adam(betas=(0.1, 0.2)), Muon(momentum=0.5)]),
)
def test_what_is_written_back_is_read_as_the_same_recipe(tmp_path_factory, name, lr, mixture, files, optimizer):
    recipe = Demo(
        name=name, train=Loop(steps=3, lr=lr, optimizer=optimizer), mixture=mixture, files=files, lora=Lora(rank=3)
    )
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Demo.load(file) == recipe


def test_help_shows_fields_descriptions_and_examples(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        load(tmp_path, "name: demo\ntrain: {lr: 0.25}\n", "--train.optimizer.kind", "muon", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert left.value.code == 0
    assert "hanlin demo RECIPE" in shown
    for part in ("--train.lr FLOAT", "peak rate; e.g. 0.0003 (default: 0.25)", "--train.optimizer.momentum"):
        assert part in shown, part
    assert "--train.optimizer.kind {adam,muon}" in shown
    assert "--train.optimizer.decay" not in shown
    assert "--mixture YAML" in shown


# --- what a mistake says


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: demo\ntrain:\n  lrr: 1\n", "demo.yaml, line 3: unknown `train.lrr`; did you mean `train.lr`?"),
        ("lr: 1\nname: demo\n", "demo.yaml, line 1: unknown `lr`; did you mean `train.lr`?"),
        ("name: demo\ntrain: {lr: -1}\n", "demo.yaml, line 2: `train.lr` is -1; it should be greater than 0."),
        (
            "name: demo\n\ntrain:\n  lr: 1\n  lr: 2\n",
            "demo.yaml, line 5: `train.lr` stands here again (first on line 4).",
        ),
        ("name: 3\n", "demo.yaml, line 1: `name` is 3; it should be text (write it in quotes)."),
        ("name: demo\ntrain: 3\n", "demo.yaml, line 2: `train` is 3; it should be a table of `key: value`."),
        (
            "name: demo\ntrain: {optimizer: {kind: muonn}}\n",
            "demo.yaml, line 2: `train.optimizer.kind` is 'muonn'; it is one of: adam, muon.",
        ),
        (
            "name: demo\ntrain: {optimizer: {kind: muon, decay: 1}}\n",
            "demo.yaml, line 2: unknown `train.optimizer.decay`: it belongs to `train.optimizer.kind` adam.",
        ),
        (
            "name: demo\nshards:\n- path: a\n- {pth: b}\n",
            "demo.yaml, line 4: unknown `shards.1.pth`; did you mean `shards.1.path`?",
        ),
        ("name: demo\ntrain: {epochs: 1}\n", "demo.yaml, line 2: `train`: give exactly one of `steps` and `epochs`."),
        ("train: {lr: 1}\n", "demo.yaml: `name` is missing; write it in the file or give `--name`."),
        ("", "demo.yaml: `name` is missing; write it in the file or give `--name`."),
        ("- a\n", "demo.yaml, line 1: a recipe is a table of `key: value` lines."),
        ("name: demo\ntrain: [1\n", "demo.yaml, line 3: this is not valid YAML: "),
        ("a: &x [*x]\n", "demo.yaml, line 1: an alias that contains itself."),
    ],
)
def test_a_mistake_in_the_file_names_its_place(tmp_path, text, said):
    assert mistake(tmp_path, text).splitlines()[0].startswith(said)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--train.lrr 1", "Unknown flag `--train.lrr`; did you mean `--train.lr`?"),
        ("--lr 1", "Unknown flag `--lr`; did you mean `--train.lr`?"),
        (
            "--train.optimizer.momentum 1",
            "Unknown flag `--train.optimizer.momentum`: it belongs to `train.optimizer.kind`",
        ),
        ("--train.lr -1", "`--train.lr` is -1.0; it should be greater than 0."),
        ("--train.lr fast", "`--train.lr` is 'fast'; it should be a number."),
        ("--train.lr 1 2", "`--train.lr` takes one value; found 2: 1 2."),
        ("--train.lr", "`--train.lr` takes one value; found none."),
        ("--train.lr 1 --train.lr 2", "`--train.lr` is given twice"),
        ("--train.device gpu", "`--train.device` is 'gpu'; it should be 'auto' or 'cpu'."),
        ("--train.optimizer.kind lion", "`--train.optimizer.kind` is 'lion'; it is one of: adam, muon."),
        ("--train.optimizer.betas 0.9", "`--train.optimizer.betas` has too few values: ['0.9']."),
        ("--train.compile perhaps", "`--train.compile` is 'perhaps'; it should be true or false."),
        ("--shards a b", "`--shards` is a table or a list of tables"),
        ("stray", "Unexpected `stray`"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(tmp_path, argv, said):
    assert said in mistake(tmp_path, "name: demo\n", *argv.split())


def test_no_mistake_shows_a_web_link_or_pydantics_own_words(tmp_path):
    text = "name: []\ntrain: {lr: x, steps: 1.5, compile: 7, optimizer: {kind: adam, betas: [1]}}\nlora: {rank: 0}\n"
    said = mistake(tmp_path, text)
    assert len(said.splitlines()) == 6
    assert "... and 1 more." in said
    for word in ("http", "pydantic", "type=", "input_value"):
        assert word not in said


def test_a_recipe_that_is_not_there_names_the_one_beside_it(tmp_path):
    load(tmp_path)
    with pytest.raises(HanlinError, match=r"There is no recipe .*dem\.yaml\. Did you mean .*demo\.yaml\?"):
        Demo.load(tmp_path / "dem.yaml")
    with pytest.raises(HanlinError, match=r"is a folder; a recipe is a YAML file\. In .* there are: demo\.yaml"):
        Demo.load(tmp_path)
    (tmp_path / "gbk.yaml").write_bytes("name: 翰林".encode("gbk"))
    with pytest.raises(HanlinError, match=r"gbk\.yaml is not UTF-8 text \(byte 6\)"):
        Demo.load(tmp_path / "gbk.yaml")


def test_the_schema_is_complete_and_refuses_unknown_keys():
    schema = Demo.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["name"]
    assert schema["$defs"]["Loop"]["properties"]["lr"]["description"] == "peak rate"


def test_the_written_recipe_is_plain_yaml(tmp_path):
    tree = yaml.safe_load(load(tmp_path, "name: demo\nfiles: [数据]\n").to_yaml())
    assert tree["train"]["optimizer"] == {"kind": "adam", "betas": [0.9, 0.95], "decay": 0.3}
    assert tree["files"] == ["数据"]
