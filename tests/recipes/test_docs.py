"""What README and docs show is run: the Python examples as they stand, the commands with tiny settings."""

import re
import shlex
from pathlib import Path

import pytest

from genrec import backends, environment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA = {"/data/ml-100k": "ml-100k", "/data/Beauty.txt": "amazon-beauty/Beauty.txt"}


def blocks(page, language):
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(prefix):
    """Every command of the pages' bash blocks that starts so, without its comment; each once."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return sorted({line.partition("#")[0].strip() for line in lines if line.startswith(prefix)})


@pytest.mark.parametrize("page", ["README.md", "docs/models.md", "docs/data.md"])
def test_python_examples(page, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENREC_CACHE", str(cache))
    examples = blocks(ROOT / page, "python")
    assert examples
    namespace = {"__name__": "example"}
    for example in examples:
        exec(compile(example, page, "exec"), namespace)


# Those that start further processes are run by tests/distributed/test_cli.py.
@pytest.mark.parametrize("command", [c for c in commands("python -m genrec.recipes.") if "trainer.devices=" not in c])
def test_recipe_commands(command, launch, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[2:]
    recipe = words.pop(0).rpartition(".")[2]
    for number, word in enumerate(words):
        path = word.removeprefix("data.path=")
        if path in DATA:
            words[number] = f"data.path={request.getfixturevalue('data_root') / DATA[path]}"
    (tmp_path / "my.yaml").write_text("base: ranking\nmodel: {num_layers: 1}\n")
    mine = next(block for block in blocks(ROOT / "docs" / "models.md", "python") if "PairwiseRanking" in block)
    (tmp_path / "my_models.py").write_text(mine)
    needs_data = "ranking_ml100k" in words and "--print-config" not in words
    if needs_data and not any(word.startswith("data.path") for word in words):
        words.append(f"data.path={request.getfixturevalue('data_root') / 'ml-100k'}")
    if "ckpt_path=last" in words:
        assert launch(recipe) == 0
    # The command's own words win over the tiny ones, but for what would make it long.
    short = ["trainer.max_epochs=1"] if "ckpt_path=last" not in words else []
    assert launch(recipe, *words, *short) == 0


@pytest.mark.parametrize("command", commands("python -m genrec.backends"))
def test_backends_commands(command, capsys):
    assert not backends.main(shlex.split(command)[3:])
    assert "torch" in capsys.readouterr().out


def test_environment_command(capsys):
    assert commands("python -m genrec.environment")
    assert environment.main() == 0
    assert "fit together" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("make "):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
