"""Megatron's process groups, and data parallel over them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from genrec.parallel import _groups as groups
from genrec.parallel import megatron
from tests.distributed.ranks import run_ranks

PRELOAD = ["megatron.core.parallel_state"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 2), "tensor_parallel_size 2 doesn't divide the 3 processes"),
        ((2, 4), "tensor_parallel_size 4 doesn't divide the 2 processes"),
        ((4, 0), "must be at least 1"),
        ((4, 4, [8, 6]), "tensor_parallel_size 4 doesn't divide num_heads 6"),
    ],
)
def test_sizes_that_do_not_fit_are_errors_with_a_cure(sizes, message):
    with pytest.raises(ValueError, match=message) as raised:
        megatron.check_sizes(*sizes)
    assert "set" in str(raised.value)


def test_missing_megatron_is_an_error_with_a_cure(monkeypatch):
    monkeypatch.setattr(groups.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tensor_parallel_size 2 needs Megatron-Core.*pip install"):
        megatron.require_megatron("tensor_parallel_size 2")


def test_groups_need_torch_distributed_and_themselves():
    with pytest.raises(RuntimeError, match="init_process_group"):
        megatron.initialize(1)
    with pytest.raises(RuntimeError, match="initialize"):
        megatron.tensor_parallel_group()
    megatron.destroy()


def _groups(rank: int, world_size: int) -> dict:
    found = {}
    for size in (1, 2, 4):
        megatron.initialize(size)
        assert megatron.is_initialized()
        tensor, data = megatron.tensor_parallel_group(), megatron.data_parallel_group()
        found[size] = {
            "tensor": dist.get_process_group_ranks(tensor),
            "data": dist.get_process_group_ranks(data),
            "places": (
                megatron.tensor_parallel_rank(), megatron.tensor_parallel_size(),
                megatron.data_parallel_rank(), megatron.data_parallel_size(),
            ),
        }  # fmt: skip
        with pytest.raises(RuntimeError, match="already"):
            megatron.initialize(size)
        megatron.destroy()
    with pytest.raises(ValueError, match="divide"):
        megatron.initialize(3)

    megatron.initialize(2)
    torch.manual_seed(rank)
    model = nn.ModuleDict({"dense": nn.Linear(3, 2), "split": nn.Linear(3, 2), "table": nn.Linear(1, 1, bias=False)})
    for parameter in model["split"].parameters():
        parameter.tensor_model_parallel = True
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.parts["dense"](x) + self.parts["split"](x)).sum() + self.parts["table"].weight.sum() * rank

    wrapped = megatron.wrap_data_parallel(Loss(), {"parts.table.weight"})
    started = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = torch.full((1, 3), float(rank))
    wrapped(x).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    nothing = nn.Linear(2, 2).requires_grad_(False)
    assert megatron.wrap_data_parallel(nothing, set()) is nothing
    megatron.destroy()
    return {"groups": found, "own": own, "started": started, "gradients": gradients}


def test_groups_and_data_parallel_on_four_ranks():
    results = run_ranks(_groups, 4, preload=PRELOAD)
    for rank, result in enumerate(results):
        made = result["groups"]
        assert made[1] == {"tensor": [rank], "data": [0, 1, 2, 3], "places": (0, 1, rank, 4)}
        pair, column = rank // 2 * 2, rank % 2
        assert made[2] == {
            "tensor": [pair, pair + 1], "data": [column, column + 2], "places": (column, 2, rank // 2, 2),
        }  # fmt: skip
        assert made[4] == {"tensor": [0, 1, 2, 3], "data": [rank], "places": (rank, 4, 0, 1)}
        for name, value in result["started"].items():
            source = {"dense": 0, "split": column, "table": rank}[name.split(".")[0]]
            assert torch.equal(value, results[source]["own"][name])
        # The mean over the ranks (column, column + 2) of their inputs.
        assert result["gradients"]["dense.weight"].tolist() == [[column + 1.0] * 3] * 2
        assert result["gradients"]["split.weight"].tolist() == [[column + 1.0] * 3] * 2
        assert result["gradients"]["table.weight"].tolist() == [[float(rank)]]
