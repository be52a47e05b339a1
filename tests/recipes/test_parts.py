"""The command line and the small parts of the recipes, without a run."""

import os

import pytest

from genrec.config import ConfigError, RankingConfig, RetrievalConfig
from genrec.recipes import _run


def words(*argv):
    return _run._read_words(argv, "ranking")


def test_words():
    assert words() == ("ranking", set(), [])
    assert words("--config", "a.yaml", "seed=1", "--help") == ("a.yaml", {"--help"}, ["seed=1"])
    assert words("--config=b", "-h", "--print-config") == ("b", {"--help", "--print-config"}, [])
    with pytest.raises(ConfigError, match="--config needs"):
        words("--config")


def test_resume_command():
    command = _run._command("ranking", ["seed=2", "ckpt_path=best", "run.dir=x"])
    assert command == "python -m genrec.recipes.ranking seed=2 run.dir=x ckpt_path=last"


def test_an_earlier_run_is_moved_aside(tmp_path, capsys):
    run = tmp_path / "run"
    for number in (1, 2):
        run.mkdir()
        (run / "config.yaml").write_text(str(number))
        _run.make_room(run)
        assert not run.exists()
        assert (tmp_path / f"run.{number}" / "config.yaml").read_text() == str(number)
    assert "run.2" in capsys.readouterr().out


def test_a_folder_that_is_no_run_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _run.make_room(tmp_path)
    _run.make_room(tmp_path / "absent")
    assert (tmp_path / "notes.txt").exists()


def test_other_ranks_move_nothing(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setenv("LOCAL_RANK", "1")
    _run.make_room(tmp_path)
    assert (tmp_path / "config.yaml").exists()


def test_checkpoint_to_resume(tmp_path):
    config = RankingConfig()
    config.run.dir = str(tmp_path)
    assert _run.checkpoint_to_resume(config) is None
    for name in ("last", "best", str(tmp_path / "mine.ckpt")):
        config.ckpt_path = name
        with pytest.raises(ConfigError, match="there is no checkpoint"):
            _run.checkpoint_to_resume(config)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    config.ckpt_path = "last"
    assert _run.checkpoint_to_resume(config) == str(tmp_path / "checkpoints" / "last.ckpt")


def test_a_class_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models_for_test.py").write_text("class Mine:\n    pass\n\nnumber = 3\n")
    assert _run.import_class("own_models_for_test.Mine").__name__ == "Mine"
    for wrong in ("own_models_for_test.Yours", "own_models_for_test.number", "no_such_module.Mine", "Mine"):
        with pytest.raises(ConfigError, match=r"model\.class_path"):
            _run.import_class(wrong)


def test_options_that_the_class_does_not_take():
    class Model:
        def __init__(self, size):
            self.size = size

    assert _run.construct(None, Model, {"size": 1}, {"size": 2}).size == 2
    with pytest.raises(ConfigError, match=r"model.options don't fit Model.*'width'"):
        _run.construct(None, Model, {"size": 1}, {"width": 2})


def test_table_of_results():
    metrics = {"test/auc/like": 0.71239, "best_reachable/auc/like": 0.75, "test/ne/like": float("nan"), "val/loss": 1.0}
    lines = _run.results_table(metrics).splitlines()
    assert [line.split() for line in lines] == [
        ["metric", "test", "best", "reachable"],
        ["auc/like", "0.7124", "0.7500"],
        ["ne/like", "-"],
    ]


@pytest.mark.parametrize("schema", [RankingConfig, RetrievalConfig])
def test_help_and_printed_config(schema, capsys, tmp_path):
    recipe = "ranking" if schema is RankingConfig else "retrieval"

    def main(*argv):
        return _run.main(recipe, schema, None, None, argv)

    assert main("--help") == 0
    text = capsys.readouterr().out
    assert f"usage: python -m genrec.recipes.{recipe} [--config NAME|PATH]" in text
    assert "trainer.max_epochs=" in text
    assert main("--print-config", "seed=7", f"run.dir={tmp_path}") == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main("--config", str(tmp_path / "printed.yaml"), "--print-config") == 0
    assert "seed: 7" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["printed.yaml"]


@pytest.mark.parametrize("argv", [["trainer.max_epoch=1"], ["--config", "nowhere"], ["seed=x"], ["--frobnicate"]])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(argv, capsys):
    assert _run.main("ranking", RankingConfig, None, None, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
