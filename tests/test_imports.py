"""What importing costs and needs: the front door is lazy, the rooms below `serve` need only the core dependencies, a
missing extra is named, and a room imports only from rooms further down the house."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hanlin

ROOT = Path(__file__).parent.parent

# Run before everything else in a fresh process: every top-level module that no core dependency brings is not there.
BLOCKER = """
import sys
class Blocker:
    blocked = set({blocked!r})
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
look = importlib.util.find_spec  # of what is not installed it says None; torch asks so for many packages
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in Blocker.blocked else look(name, *rest)
"""


def core_closure() -> set[str]:
    """The distributions that `pip install hanlin` brings, by what is installed here."""
    found: set[str] = set()
    waiting = [("hanlin", frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        for line in importlib.metadata.requires(name) or []:
            need = Requirement(line)
            wanted = [{"extra": extra} for extra in extras | {""}]
            if need.marker is not None and not any(need.marker.evaluate(extra) for extra in wanted):
                continue
            key = canonical(need.name)
            try:
                importlib.metadata.distribution(key)
            except importlib.metadata.PackageNotFoundError:
                continue
            if key not in found:
                found.add(key)
                waiting.append((key, frozenset(need.extras)))
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def blocked_modules() -> list[str]:
    """Every importable top-level name that only packages outside the core closure bring."""
    core = core_closure() | {"hanlin"}
    homes = importlib.metadata.packages_distributions()
    return sorted(module for module, names in homes.items() if not {canonical(name) for name in names} & core)


def with_core_only(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked_modules()) + code, *argv], capture_output=True, text=True
    )


def rooms_below(room: str) -> list[str]:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = contract["contracts"][0]["layers"]
    return [name for layer in layers[layers.index(room) + 1 :] for name in re.findall(r"\w+", layer)]


def modules_of(rooms: list[str]) -> list[str]:
    source = ROOT / "src"
    files = sorted(file for room in rooms for file in (source / "hanlin" / room).rglob("*.py"))
    return [".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__") for file in files]


def test_the_blocker_blocks_extras_and_spares_the_core():
    blocked = set(blocked_modules())
    assert {"fastapi", "uvicorn", "nicegui", "transformers", "pytest", "pyarrow", "openai"} <= blocked
    assert not {"torch", "numpy", "safetensors", "pydantic", "tyro", "yaml", "jinja2", "rich", "hanlin"} & blocked
    assert "No module named 'fastapi'" in with_core_only("import fastapi").stderr


def test_every_module_below_serve_needs_only_the_core_dependencies():
    modules = modules_of([*rooms_below("serve"), "quickstart", "cli"])
    assert {"hanlin.core.recipe", "hanlin.train.trainer", "hanlin.engine.engine"} <= set(modules)
    code = """
import importlib, json
failed = {}
for module in json.loads(sys.argv[1]):
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps(failed))
"""
    done = with_core_only(code, json.dumps(modules))
    assert json.loads(done.stdout.splitlines()[-1]) == {}, done.stderr


@pytest.mark.parametrize(("argv", "extra"), [(["serve", "."], "serve"), (["quickstart"], "studio")])
def test_a_command_whose_extra_is_missing_names_it_and_the_pip_line(argv, extra, tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); from hanlin.cli import main; sys.exit(main(sys.argv[1:]))"
    done = with_core_only(code, *argv)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"It belongs to the extra {extra!r}: pip install -c constraints.txt -e '.[{extra}]'" in done.stderr


def test_the_public_names_are_exported_lazily():
    code = """
import sys, json, hanlin
before = sorted(name for name in ("torch", "numpy", "pydantic") if name in sys.modules)
found = {name: getattr(hanlin, name).__name__ for name in hanlin.__all__}
print(json.dumps([before, found, dir(hanlin)]))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, found, listed = json.loads(output)
    assert before == []
    public = {"load_model", "save_model", "Tokenizer", "Engine", "SamplingParams", "Trainer", "Recipe"}
    assert set(found) == set(found.values()) == set(listed) == public
    with pytest.raises(AttributeError, match="has no attribute 'train_model'"):
        _ = hanlin.train_model


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_room_imports_only_from_rooms_further_down():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


def test_the_floors_are_not_open(tmp_path):
    """The contract fails on an import that goes up: one is planted in a package of the same shape."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace('"hanlin', '"house')
    (tmp_path / "pyproject.toml").write_text(settings[settings.index("[tool.importlinter]") :], encoding="utf-8")
    layers = tomllib.loads(settings)["tool"]["importlinter"]["contracts"][0]["layers"]
    for room in [name for layer in layers for name in re.findall(r"\w+", layer)]:
        (tmp_path / "house" / room).mkdir(parents=True)
        (tmp_path / "house" / room / "__init__.py").touch()
    for name in ("errors", "files", "recipe", "progress", "metrics"):
        (tmp_path / "house" / "core" / f"{name}.py").touch()
    (tmp_path / "house" / "__init__.py").touch()
    sound = lint_imports(tmp_path)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    (tmp_path / "house" / "nn" / "up.py").write_text("import house.engine\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1
    assert "house.nn.up -> house.engine" in broken.stdout
