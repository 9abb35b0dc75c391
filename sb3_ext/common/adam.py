"""Adam for parameters that lie in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

# What torch's own fused step ends in
_fused_adam: Any = getattr(th, "_fused_adam_", None)


def fused_unless(optimizer_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param optimizer_kwargs: SB3's ``optimizer_kwargs`` for Adam
    :return: The same, and that Adam is to be fused, unless they name another implementation
    """
    others = optimizer_kwargs.get("foreach") or optimizer_kwargs.get("differentiable")
    return {"fused": not others, **optimizer_kwargs}


class SingleTensorAdam(th.optim.Adam):
    """
    torch's Adam for a single parameter, with the same numbers and the same state. A small network spends a good part of
    its optimizer step on looking for parameters; here there is nothing to look for. Hooks of optimizers are not called.

    :param args: As of ``th.optim.Adam``
    :param kwargs: As of ``th.optim.Adam``
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        group = self.param_groups[0]
        (param,) = group["params"]
        state = self.state.get(param)
        # The first step makes the state
        if not state or closure is not None or not self._is_plain(group):
            return super().step(closure)
        beta1, beta2 = group["betas"]
        with th.no_grad():
            state["step"].add_(1)
            _fused_adam(
                [param],
                [param.grad],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
                grad_scale=None,
                found_inf=None,
            )
        return None

    # The base class wraps a step that does not say this into calls of hooks and the profiler
    step.hooked = True  # type: ignore[attr-defined]

    @staticmethod
    def _is_plain(group: dict[str, Any]) -> bool:
        others = group["amsgrad"] or group["differentiable"] or group.get("decoupled_weight_decay", False)
        return _fused_adam is not None and bool(group["fused"]) and not others and isinstance(group["lr"], float)
