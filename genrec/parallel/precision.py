"""Lightning's precision plugins, with gradient clipping over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision, Precision


class _ClipsWholeModel:
    """Clips by the norm of the whole model's gradient, of which a tensor-parallel rank holds a part.

    Tables that are updated in the backward pass have no gradient left to clip; `TableOptimizerConfig.max_gradient` is
    theirs.
    """

    def clip_grad_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        """As `torch.nn.utils.clip_grad_norm_`."""
        from genrec.parallel import megatron
        from genrec.parallel.parallelize import clip_grad_norm

        if parts := megatron.distributed_parts([optimizer]):
            # Their gradients are still on the way to the ranks that step: they clip themselves once these are there.
            for part in parts:
                part.clip_next(float(clip_val))
            return
        clip_grad_norm(self.main_params(optimizer), clip_val)  # type: ignore[attr-defined]

    def clip_grad_by_value(self, optimizer: Any, clip_val: int | float) -> None:
        """As `torch.nn.utils.clip_grad_value_`.

        Raises:
            ValueError: Megatron's distributed optimizer holds the gradients.
        """
        from genrec.parallel import megatron

        if megatron.distributed_parts([optimizer]):
            raise ValueError(
                "dense='megatron' clips by norm alone: set gradient_clip_algorithm='norm' or dense='torch'."
            )
        super().clip_grad_by_value(optimizer, clip_val)  # type: ignore[misc]


class HybridPrecision(_ClipsWholeModel, Precision):
    """32-true."""


class HybridMixedPrecision(_ClipsWholeModel, MixedPrecision):
    """bf16-mixed."""


def hybrid_precision(plugin: Precision | None) -> Precision:
    """The plugin that does for HybridParallelStrategy what `plugin` does elsewhere.

    Raises:
        ValueError: Its precision is not for tables that are updated in the backward pass.
    """
    if plugin is None or type(plugin) is Precision:
        return HybridPrecision()
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return HybridMixedPrecision(plugin.precision, plugin.device)
    if isinstance(plugin, _ClipsWholeModel):
        return plugin
    raise ValueError(
        f"HybridParallelStrategy updates tables in the backward pass and has no precision '{plugin.precision}': choose "
        "'32-true' or 'bf16-mixed'."
    )
