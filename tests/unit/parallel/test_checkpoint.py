"""Checkpoint folders of one process: what is written, what is refused, what a damaged one leads to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genrec.parallel import _folders, checkpoint
from genrec.parallel._pieces import METADATA


class Model(nn.Module):
    """Two parameters, a buffer, and a state that is no tensor."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.register_buffer("counts", torch.arange(4))
        self.note = "none"

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def trained(steps: int = 2, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[Model, Any]:
    torch.manual_seed(steps)
    model = Model()
    model.note = f"step {steps}"
    trainer = optimizer(model.parameters(), lr=0.1 * steps)  # type: ignore[call-arg]
    for _ in range(steps):
        model.linear(torch.randn(2, 6)).square().sum().backward()
        trainer.step()
        trainer.zero_grad()
    return model, trainer


def save(path: Path, steps: int = 2, **options: Any) -> tuple[Model, Any]:
    model, trainer = trained(steps)
    content = {"global_step": steps, "epoch": 0, "callbacks": {"x": {"best": torch.tensor(1.5)}}, **options}
    checkpoint.save(path, content, model, [trainer])
    return model, trainer


def load(path: Path, **options: Any) -> tuple[Model, Any, dict[str, Any]]:
    model, trainer = trained(1)
    return model, trainer, checkpoint.load(path, model, [trainer], **options)


def assert_same(left: tuple[Model, Any], right: tuple[Model, Any]) -> None:
    for (name, value), (_, other) in zip(left[0].named_parameters(), right[0].named_parameters(), strict=True):
        assert torch.equal(value, other), name
    assert left[0].note == right[0].note
    one, two = left[1].state_dict(), right[1].state_dict()
    for group, other in zip(one["param_groups"], two["param_groups"], strict=True):
        assert group == {key: value for key, value in other.items() if key != "param_names"}
    for number, state in one["state"].items():
        assert state.keys() == two["state"][number].keys()
        assert all(torch.equal(value, two["state"][number][key]) for key, value in state.items())


def part(path: Path, name: str) -> Path:
    """A file of the data folder."""
    return next((path / json.loads((path / _folders.MANIFEST).read_text())["data"]).glob(name))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path / "a.ckpt")
    draws = torch.rand(3)
    model, trainer, content = load(tmp_path / "a.ckpt")
    assert_same(saved, (model, trainer))
    assert (content["global_step"], content["callbacks"]["x"]["best"].item()) == (2, 1.5)
    checkpoint.restore_rng(content)
    assert torch.equal(torch.rand(3), draws)
    # Over itself: the old data goes.
    again = save(tmp_path / "a.ckpt", 3)
    assert_same(again, load(tmp_path / "a.ckpt")[:2])
    assert len(list((tmp_path / "a.ckpt").glob("data-*"))) == 1
    # As one file, in Lightning's layout.
    assert checkpoint.main([str(tmp_path / "a.ckpt"), str(tmp_path / "a.file")]) == 0
    file = torch.load(tmp_path / "a.file", weights_only=True)
    model, trainer = trained(1)
    model.load_state_dict(file["state_dict"])
    trainer.load_state_dict(file["optimizer_states"][0])
    assert_same(again, (model, trainer))


def test_weights_alone(tmp_path: Path) -> None:
    model, _ = trained(2)
    checkpoint.save(tmp_path / "a.ckpt", {"global_step": 2}, model)
    other, own = trained(1)
    before = own.state_dict()
    checkpoint.load(tmp_path / "a.ckpt", other)
    assert torch.equal(other.linear.weight, model.linear.weight)
    assert own.state_dict()["state"][0]["step"] == before["state"][0]["step"] == 1
    with pytest.raises(ValueError, match="holds the weights alone"):
        checkpoint.load(tmp_path / "a.ckpt", other, [own])


def test_async_saves_copy_at_once_and_raise_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trainer = trained(2)
    expected = model.linear.weight.detach().clone()
    save(tmp_path / "old.ckpt")
    checkpoint.save(tmp_path / "a.ckpt", {"global_step": 2}, model, [trainer], async_save=True)
    checkpoint.remove(tmp_path / "old.ckpt")
    with torch.no_grad():
        model.linear.weight.zero_()
    checkpoint.wait()
    assert not (tmp_path / "old.ckpt").exists()
    assert torch.equal(load(tmp_path / "a.ckpt")[0].linear.weight, expected)

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_folders, "commit", full)
        checkpoint.save(tmp_path / "b.ckpt", {"global_step": 3}, model, [trainer], async_save=True)
        checkpoint.remove(tmp_path / "a.ckpt")
        with pytest.raises(RuntimeError, match=r"b.ckpt' could not be saved: No space left"):
            checkpoint.save(tmp_path / "c.ckpt", {"global_step": 4}, model, [trainer])
    # What was to go once b.ckpt is there stays, and nothing of b.ckpt is left.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.ckpt"]
    assert torch.equal(load(tmp_path / "a.ckpt")[0].linear.weight, expected)


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, "meta.pt", _folders.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_damaged_files_are_named_and_the_newest_complete_checkpoint_is_taken(
    tmp_path: Path, name: str, damage: str
) -> None:
    older, newer, last = (tmp_path / f"{kind}.ckpt" for kind in ("older", "newer", "last"))
    save(older, 2)
    kept = save(newer, 3)
    save(last, 4)
    file = last / name if name == _folders.MANIFEST else part(last, name)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else content + b"}")
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        load(last, fallback=False)
    with pytest.warns(UserWarning, match=rf"{name}.*Taking '.*newer.ckpt' instead: step 3"):
        model, trainer, content = load(last)
    assert_same(kept, (model, trainer))
    assert content["global_step"] == 3
    shutil.rmtree(older)
    shutil.rmtree(newer)
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        load(last)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="not a URL"):
        load("s3://bucket/a.ckpt")  # type: ignore[arg-type]
    assert checkpoint.main([str(tmp_path / "a.ckpt")]) == 1
    assert checkpoint.main([]) == 2


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_runs_code(tmp_path: Path) -> None:
    """Neither meta.pt nor DCP's .metadata, which is a pickle; sizes in checkpoint.json are made to fit."""
    path, mark = tmp_path / "a.ckpt", tmp_path / "mark"

    def replace(file: Path, content: bytes) -> None:
        file.write_bytes(content)
        manifest = json.loads((path / _folders.MANIFEST).read_text())
        manifest["files"][file.name] = len(content)
        (path / _folders.MANIFEST).write_text(json.dumps(manifest))

    save(path)
    replace(part(path, METADATA), pickle.dumps(Touch(mark)))
    with pytest.raises(ValueError, match=r"\.metadata' can't be read: it asks for posix.mkdir"):
        load(path)
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        load(path, weights_only=False)
    with pytest.warns(UserWarning, match="weights_only=False alone"):
        save(path, 2, hyper_parameters={"path": Touch(mark)})
    with pytest.raises(ValueError, match=r"meta.pt' can't be read: .*if you trust it"):
        load(path)
    assert not mark.exists()
    load(path, weights_only=False)
    assert mark.exists()


def test_states_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(path)
    adagrad = trained(1, torch.optim.Adagrad)
    with pytest.raises(ValueError, match=r"'linear.weight' was saved as exp_avg .* trained by Adagrad"):
        checkpoint.load(path, adagrad[0], [adagrad[1]])
    with pytest.raises(ValueError, match=r"'linear.weight' has size \(3, 5\), in the checkpoint \(3, 6\)"):
        checkpoint.load(path, Model(5))
    model = Model()
    model.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Missing in the checkpoint: more\.bias, more\.weight"):
        checkpoint.load(path, model)
    checkpoint.load(path, model, strict=False)
    with pytest.raises(ValueError, match=r"Not in the module: counts, linear\.bias"):
        checkpoint.load(path, nn.Module())
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(ValueError, match=r"SGD trains a parameter of shape \(2,\) that the module doesn't have"):
        checkpoint.save(path, {}, Model(), [stranger])


def test_a_parameter_that_was_not_trained_before_starts_anew(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.AdamW([model.linear.weight])
    model.linear(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "a.ckpt", {}, model, [optimizer])
    other, trainer = trained(1)
    with pytest.warns(UserWarning, match="did not train linear.bias"):
        checkpoint.load(tmp_path / "a.ckpt", other, [trainer])
    assert trainer.state[other.linear.weight]["exp_avg"].abs().sum() > 0
    assert trainer.state[other.linear.bias]["exp_avg"].abs().sum() == 0


def test_files_of_one_process_load_too_and_give_way_to_folders(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    saved = trained(3)
    content = {"global_step": 3, "state_dict": saved[0].state_dict(), "optimizer_states": [saved[1].state_dict()]}
    torch.save(content, path)
    model, trainer, rest = load(path)
    assert_same(saved, (model, trainer))
    assert rest == {"global_step": 3}
    again = save(path, 4)
    assert path.is_dir()
    assert_same(again, load(path)[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_links_and_removal(tmp_path: Path) -> None:
    saved = save(tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt", target_is_directory=True)
    assert_same(saved, load(tmp_path / "last.ckpt")[:2])
    checkpoint.remove(tmp_path / "last.ckpt")
    assert_same(saved, load(tmp_path / "a.ckpt")[:2])
    (tmp_path / "last.ckpt").symlink_to("a.ckpt", target_is_directory=True)
    save(tmp_path / "last.ckpt", 3)
    assert_same(saved, load(tmp_path / "a.ckpt")[:2])
    for name in ("a.ckpt", "last.ckpt", "absent.ckpt"):
        checkpoint.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
