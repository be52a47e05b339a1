"""The gradients of dense parameters averaged over the data-parallel group, by torch or by Megatron.

Megatron's part runs in tests with `torch.cuda` replaced by the CPU, where it gives what torch's gives; it has not yet
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from genrec._optimizer_names import step_device
from genrec.parallel._groups import (
    DENSE,
    data_parallel_group,
    quiet_import,
    tensor_parallel_group,
    tensor_parallel_size,
)


def wrap_data_parallel(module: nn.Module, ignored: set[str], dense: str = "torch", **options: Any) -> nn.Module:
    """The module with the gradients of its dense parameters averaged over the data-parallel group.

    All parameters and buffers but the ignored are first made equal: replicated ones over the tensor-parallel group,
    all over the data-parallel group. Call the wrapper for the forward pass; the module itself stays as it was.

    Args:
        module: With its tensor-parallel parts in place, on its device.
        ignored: Names of parameters and buffers that are none of its business: those of sharded tables.
        dense: "torch": DistributedDataParallel, any device. "megatron": Megatron's, on CUDA alone.
        options: Of torch's DistributedDataParallel ("torch"), or of Megatron's DistributedDataParallelConfig.

    Returns:
        The wrapper, with `module` as its attribute; the module itself where no dense parameter is trained.

    Raises:
        ValueError: Megatron's on another device than CUDA, or an unknown `dense`.
    """
    if dense not in DENSE:
        raise ValueError(f"dense must be 'torch' or 'megatron', got '{dense}'.")
    trained = {name: p for name, p in module.named_parameters() if name not in ignored and p.requires_grad}
    _equalize(module, ignored)
    if not trained:
        return module
    if dense == "megatron":
        return MegatronDataParallel(module, trained, **options)
    # The one way to leave parameters out; TorchRec's own wrapper goes it too.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))
    device = next(iter(trained.values())).device
    cuda = [device] if device.type == "cuda" else None
    settings: dict[str, Any] = {"broadcast_buffers": False, "device_ids": cuda, **options}
    return DistributedDataParallel(module, process_group=data_parallel_group(), **settings)


def _equalize(module: nn.Module, ignored: set[str]) -> None:
    """The first rank's values of what every rank of a tensor-parallel group has whole, then of a data-parallel one."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    whole = [t for name, t in named.items() if name not in ignored and not getattr(t, "tensor_model_parallel", False)]
    split = [t for name, t in named.items() if name not in ignored and getattr(t, "tensor_model_parallel", False)]
    for group, tensors in ((tensor_parallel_group(), whole), (data_parallel_group(), whole + split)):
        if dist.get_world_size(group) > 1:
            source = dist.get_global_rank(group, 0)
            for tensor in tensors:
                dist.broadcast(tensor.detach(), source, group=group)


# Megatron's, on CUDA --------------------------------------------------------------------------------------------------


class _Parameters(nn.Module):
    """Nothing but parameters: Megatron's wrapper takes all that its module has, and tables are not for it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)


class MegatronDataParallel(nn.Module):
    """Megatron's DistributedDataParallel: gradients are added up in contiguous buffers, and each bucket of them is
    reduced while the backward pass goes on. A `DistributedAdamW` steps on what each rank then has.

    Every trained parameter must have a gradient in every step. Parameters have no `.grad` outside the backward pass.

    Args:
        module: Called by `forward`.
        trained: The dense parameters, by name.
        options: Fields of Megatron's DistributedDataParallelConfig that differ.

    Raises:
        ValueError: Parameters that are not fp32 on CUDA.
    """

    def __init__(self, module: nn.Module, trained: Mapping[str, nn.Parameter], **options: Any) -> None:
        super().__init__()
        for name, parameter in trained.items():
            if not parameter.is_cuda or parameter.dtype != torch.float32:
                raise ValueError(
                    f"dense='megatron' needs fp32 parameters on CUDA, and '{name}' is {parameter.dtype} on "
                    f"{parameter.device.type}: set dense='torch'."
                )
        with quiet_import():
            from megatron.core import distributed
            from megatron.core.transformer import TransformerConfig

        size = tensor_parallel_size()
        config = TransformerConfig(
            num_layers=1, hidden_size=size, num_attention_heads=size, tensor_model_parallel_size=size
        )
        settings: dict[str, Any] = {"overlap_grad_reduce": True, "use_distributed_optimizer": True, **options}
        settings = distributed.DistributedDataParallelConfig(**settings)
        self.module = module
        # In a tuple, so that its parameters don't get a second name here.
        self._reducer = (distributed.DistributedDataParallel(config, settings, _Parameters(trained)),)

    @property
    def reducer(self) -> Any:
        """Megatron's wrapper of the dense parameters."""
        return self._reducer[0]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's."""
        return self.module(*inputs, **options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients are only added up: all but the last batch of an accumulation."""
        with self.reducer.no_sync():
            yield


class DistributedAdamW(Optimizer):
    """An AdamW whose moments and updates are spread over the data-parallel group by Megatron's distributed optimizer.

    Its groups are those of the AdamW that it replaces, whole parameters and all, so schedulers and checkpoints see
    nothing new. The state is spread; `collect_state` fills `state` with whole moments, `spread_state` takes them back.

    Args:
        adamw: Of exactly the parameters of `wrapper`; its group dicts are taken over.
        wrapper: What reduces their gradients.

    Raises:
        ValueError: Another optimizer than AdamW, other parameters, or options that Megatron's has not.
    """

    def __init__(self, adamw: Optimizer, wrapper: MegatronDataParallel) -> None:
        if type(adamw) is not torch.optim.AdamW:
            raise ValueError(f"dense='megatron' spreads AdamW, and not {type(adamw).__name__}: set dense='torch'.")
        for group in adamw.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("dense='megatron' has no amsgrad and no maximize: set dense='torch'.")
        self.reducer = wrapper.reducer
        held = {id(p) for group in adamw.param_groups for p in group["params"]}
        if held != {id(p) for p in self.reducer.module.parameters()}:
            raise ValueError("dense='megatron' needs one AdamW of all trained dense parameters: set dense='torch'.")
        super().__init__(adamw.param_groups, adamw.defaults)
        self.grad_norm: float | None = None
        self._inner = _distributed(adamw.param_groups, self.reducer)

    def clip_next(self, max_norm: float) -> None:
        """Scale the gradients of the coming step down to this norm of the whole model's, if theirs is larger."""
        self._inner.config.clip_grad = max_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Wait for the gradients, clip them if `clip_next` was called, step; gradients are zero after it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reducer.finish_grad_sync()
        for own, spread in zip(self.param_groups, self._inner.param_groups, strict=True):
            spread.update({name: own[name] for name in _OPTIONS})
        _, self.grad_norm, _ = self._inner.step()
        self._inner.config.clip_grad = 0.0
        self.reducer.zero_grad_buffer()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state.pop(parameter, None)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the buffers, in which gradients are added up."""
        self.reducer.zero_grad_buffer()

    @torch.no_grad()
    def collect_state(self) -> None:
        """Fill `state` with each parameter's step and whole moments, on the CPU; all data-parallel ranks together.

        It is there until the next step. Before the first step there is none.
        """
        inner = self._inner.optimizer
        if not inner.state:
            return
        step = next((s["step"] for s in inner.state.values() if "step" in s), inner.param_groups[0].get("step", 0))
        saved = self._inner.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        for parameter, place, flat in self._places(saved):
            self.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{name: flat[name][place].view(parameter.shape).clone() for name in _MOMENTS},
            }

    @torch.no_grad()
    def spread_state(self) -> None:
        """Take over what `state` has of every parameter; all data-parallel ranks together."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not all(self.state.get(parameter) for parameter in parameters):
            return
        inner = self._inner.optimizer
        step = float(self.state[parameters[0]]["step"])
        inner.state.clear()
        self._inner.init_state_fn(inner, self._inner.config)
        # Of the values only those of the group's first rank are read.
        saved = self._inner.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=True, return_on_all_ranks=True)
        for parameter, place, flat in self._places(saved):
            flat["param"][place] = parameter.detach().flatten().cpu()
            for name in _MOMENTS:
                flat[name][place] = self.state[parameter][name].detach().flatten().cpu()
        self._inner.load_parameter_state_from_dp_zero(saved)
        if isinstance(inner, torch.optim.AdamW):
            for parameter, state in inner.state.items():
                state["step"] = torch.tensor(step, device=step_device(inner, parameter))
        else:
            # Apex's and Transformer Engine's count in the group.
            for group in inner.param_groups:
                group["step"] = int(step)

    def _places(self, saved: Mapping[Any, Any]) -> Iterator[tuple[nn.Parameter, slice, dict[str, Tensor]]]:
        """Each parameter, and where it lies in the flat tensors of its buffer, which lack the padding of buckets."""
        for index, buffer in enumerate(self.reducer.buffers):
            (flat,) = saved[index].values()
            before = [0]
            for bucket in buffer.buckets:
                before.append(before[-1] + bucket.numel_unpadded)
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                first = before[bucket] + start - buffer.buckets[bucket].offset
                yield parameter, slice(first, first + end - start), flat


def _parts(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        parts = getattr(optimizer, "optimizers", None)
        yield from parts.values() if isinstance(parts, Mapping) else [optimizer]


def distribute_optimizer(optimizer: Optimizer, wrapper: MegatronDataParallel) -> Optimizer:
    """The optimizer with a `DistributedAdamW` where its AdamW of the dense parameters was.

    Args:
        optimizer: An AdamW; or one made of several with `optimizers` by name and `replace(name, optimizer)`, in place.
        wrapper: What reduces the gradients of the dense parameters.

    Raises:
        ValueError: As `DistributedAdamW`.
    """
    parts = getattr(optimizer, "optimizers", None)
    if not isinstance(parts, Mapping):
        return DistributedAdamW(optimizer, wrapper)
    dense = {id(parameter) for parameter in wrapper.reducer.module.parameters()}
    for name, part in list(parts.items()):
        if any(id(parameter) in dense for group in part.param_groups for parameter in group["params"]):
            optimizer.replace(name, DistributedAdamW(part, wrapper))  # type: ignore[attr-defined]
    return optimizer


def distributed_parts(optimizers: Iterable[Optimizer]) -> list[DistributedAdamW]:
    """Those of the optimizers, or of their parts, whose state is spread over ranks.

    Call `collect_state` of each before a checkpoint is written, `spread_state` after one is read.
    """
    return [part for part in _parts(optimizers) if isinstance(part, DistributedAdamW)]


_OPTIONS = ("lr", "betas", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _distributed(groups: list[dict[str, Any]], reducer: Any) -> Any:
    """Megatron's distributed optimizer with the same groups in the same order."""
    with quiet_import():
        from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamPredicate, get_megatron_optimizer

    def of(group: dict[str, Any]) -> Callable[[Tensor], bool]:
        members = {id(parameter) for parameter in group["params"]}
        return lambda parameter: id(parameter) in members

    overrides = {
        # Megatron sorts groups by their options in alphabetical order, and merges equal ones: the number comes first.
        ParamKey(predicate=ParamPredicate(f"group {number}", of(group))): {
            "_number": number, **{name: group[name] for name in _OPTIONS},
        }
        for number, group in enumerate(groups)
    }  # fmt: skip
    first = groups[0]
    config = OptimizerConfig(
        optimizer="adam", lr=first["lr"], weight_decay=first["weight_decay"], adam_beta1=first["betas"][0],
        adam_beta2=first["betas"][1], adam_eps=first["eps"], clip_grad=0.0, use_distributed_optimizer=True,
    )  # fmt: skip
    (optimizer,) = get_megatron_optimizer(config, [reducer], overrides).chained_optimizers
    return optimizer
