"""Network parameters as views of one contiguous tensor."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch as th
from torch import nn

from sb3_ext.common.adam import SingleTensorAdam, fused_unless


class FlatParameters:
    """
    The parameters of one or more modules, laid out as views of a single contiguous tensor.

    A small network spends most of an update on the overhead of one kernel per parameter. With this layout the
    optimizer step, the Polyak step and the gradient norm are one kernel each, whatever the number of layers.
    The modules go on working as usual: ``state_dict``, ``load_state_dict`` and in-place initialization write through
    the views. ``rebind`` must be called after anything that gives parameters other memory, such as ``.to()`` or pickle;
    :class:`FlatParametersMixin` does that for policies.

    Parameters that are frozen (``requires_grad_(False)``) stay as they are, and nothing depends on their gradients.

    :param modules: Modules whose parameters are taken over, or single parameters, in this order; a parameter that occurs
        twice is taken once.
    :raises ValueError: if the modules have no parameters or parameters of several types or devices.
    """

    def __init__(self, *modules: nn.Module | nn.Parameter) -> None:
        params = (module.parameters() if isinstance(module, nn.Module) else [module] for module in modules)
        self.params = list(dict.fromkeys(chain.from_iterable(params)))
        if len({(param.dtype, param.device) for param in self.params}) != 1:
            raise ValueError("FlatParameters needs modules whose parameters share one dtype and one device.")
        # The leaf that the optimizer sees. It is no part of any module: the modules' own parameters are what is saved.
        self.tensor = nn.Parameter(th.empty(0, dtype=self.params[0].dtype))
        self.bind()

    def consists_of(self, params: Sequence[th.Tensor]) -> bool:
        """
        :param params: Parameters
        :return: Whether these are ``params``, the same objects in the same order
        """
        return len(params) == len(self.params) and self.ends_with(params)

    def ends_with(self, params: Sequence[th.Tensor]) -> bool:
        """
        :param params: Parameters, at least one
        :return: Whether the last of these are ``params``, the same objects in the same order
        """
        last = self.params[-len(params) :]
        return len(last) == len(params) and all(a is b for a, b in zip(params, last, strict=True))

    @property
    def is_bound(self) -> bool:
        """Whether the parameters are still views of ``tensor``."""
        begin = self.tensor.data_ptr()
        return all(param.data_ptr() - begin == offset for param, offset in self._offsets)

    def bind(self) -> None:
        """Copy the parameters' current values into one new tensor and make the parameters views of it."""
        self.tensor.grad = None
        self._gradient_views: list[th.Tensor] = []
        self.tensor.data = self.flatten([param.data for param in self.params])
        for param, view in zip(self.params, self.unflatten(self.tensor.data), strict=True):
            param.data = view
        begin = self.tensor.data_ptr()
        # What is empty lies nowhere
        self._offsets = [(param, param.data_ptr() - begin) for param in self.params if param.numel() > 0]

    def rebind(self) -> None:
        """As ``bind``, if the parameters are no longer views."""
        if not self.is_bound:
            self.bind()

    def backward(
        self,
        outputs: th.Tensor | Sequence[th.Tensor],
        gradients: Sequence[th.Tensor] | None = None,
    ) -> None:
        """
        Compute the gradient of a loss with respect to these parameters, and to no others.

        :param outputs: The loss, a scalar, or what it is computed from. A parameter that does not matter for them, or is
            frozen, gets a gradient of zero.
        :param gradients: Of the loss with respect to each of ``outputs`` (None: they are the loss)
        """
        backward(outputs, self, gradients=gradients)

    def gradient_views(self) -> list[th.Tensor]:
        """
        :return: Views of the gradient, one for each of ``params``, to write to; valid until the next ``bind``
        """
        self._gradient()
        return self._gradient_views

    def _gradient(self) -> th.Tensor:
        if self.tensor.grad is None:
            self.tensor.grad = th.empty_like(self.tensor)
            self._gradient_views = self.unflatten(self.tensor.grad)
        return self.tensor.grad

    def flatten(self, tensors: Sequence[th.Tensor]) -> th.Tensor:
        """
        :param tensors: One for each of ``params``, of its shape
        :return: Their elements in the order of ``tensor``, (n_parameters,)
        """
        return th.cat([tensor.reshape(-1) for tensor in tensors])

    def unflatten(self, vector: th.Tensor) -> list[th.Tensor]:
        """
        :param vector: (n_parameters,), in the order of ``tensor``
        :return: Its elements as one view for each of ``params``, of its shape
        """
        parts = vector.split([param.numel() for param in self.params])
        return [part.view(param.shape) for param, part in zip(self.params, parts, strict=True)]

    def make_optimizer(
        self, optimizer_class: type[th.optim.Optimizer], learning_rate: float, optimizer_kwargs: dict[str, Any]
    ) -> th.optim.Optimizer:
        """
        :param optimizer_class: SB3's ``optimizer_class``
        :param learning_rate: > 0
        :param optimizer_kwargs: SB3's ``optimizer_kwargs``; Adam is fused unless they say something else
        :return: An optimizer over ``tensor``
        :raises ValueError: if the optimizer treats matrices in another way than vectors
        """
        if optimizer_class is th.optim.Adafactor:
            raise ValueError(
                "Adafactor looks at the shape of each parameter, but all are one vector: use another optimizer_class."
            )
        if optimizer_class is th.optim.Adam:
            return SingleTensorAdam([self.tensor], lr=learning_rate, **fused_unless(optimizer_kwargs))
        return optimizer_class([self.tensor], lr=learning_rate, **optimizer_kwargs)  # type: ignore[call-arg]

    def minimize(self, loss: th.Tensor, optimizer: th.optim.Optimizer, max_grad_norm: float | None = None) -> None:
        """
        One step of gradient descent.

        :param loss: Scalar
        :param optimizer: Optimizer over ``self.tensor``
        :param max_grad_norm: Scale the gradient down to this Euclidean norm if it is longer (None: leave it)
        """
        self.backward(loss)
        self.step(optimizer, max_grad_norm)

    def step(self, optimizer: th.optim.Optimizer, max_grad_norm: float | None = None) -> None:
        """
        One step along the gradient that is there.

        :param optimizer: Optimizer over ``self.tensor``
        :param max_grad_norm: Scale the gradient down to this Euclidean norm if it is longer (None: leave it)
        """
        frozen = [pair for pair in zip(self.params, self.gradient_views(), strict=True) if not pair[0].requires_grad]
        for _, gradient in frozen:
            gradient.zero_()
        # Momentum and weight decay move parameters without a gradient, too
        kept = [param.detach().clone() for param, _ in frozen]
        if max_grad_norm is not None:
            # As torch's clip_grad_norm_, which spends its time on looking for gradients
            gradient = self._gradient()
            scale = max_grad_norm / (th.linalg.vector_norm(gradient) + 1e-6)
            # On CPU, a look at the number costs less than a pass over the gradient
            if not gradient.is_cpu or scale < 1.0:
                gradient.mul_(scale.clamp_(max=1.0))
        optimizer.step()
        for (param, _), value in zip(frozen, kept, strict=True):
            param.data.copy_(value)

    def polyak_update(self, online: FlatParameters, tau: float) -> None:
        """
        Move these (target) parameters towards the online ones: ``target <- (1 - tau) * target + tau * online``.

        :param online: Its first parameters must be the counterparts of these ones, in the same order.
        :param tau: Between 0 (no change) and 1 (copy)
        """
        self.tensor.data.lerp_(online.tensor.data[: self.tensor.numel()], tau)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParameters:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.params = deepcopy(self.params, memo)
        copied.tensor = deepcopy(self.tensor, memo)
        # Parameters are copied one by one, each into memory of its own
        copied.bind()
        return copied


class FlatParametersMixin(nn.Module):
    """
    Policy mixin: keeps the :class:`FlatParameters` among a module's attributes valid when the module is moved to
    another device or type, and otherwise whenever ``rebind`` is called.
    """

    def rebind(self) -> None:
        """
        See to it that optimizers move the parameters wherever these lie now; to be called before training.

        :raises ValueError: if a parameter belongs to more than one of the :class:`FlatParameters`
        """
        flats = [attribute for attribute in vars(self).values() if isinstance(attribute, FlatParameters)]
        moved = [flat for flat in flats if not flat.is_bound]
        for flat in moved:
            flat.bind()
        if moved and not all(flat.is_bound for flat in flats):
            raise ValueError(
                f"Networks of {type(self).__name__} that have optimizers of their own share a module, maybe one in "
                "`features_extractor_kwargs`: let each network make its own."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.rebind()
        return self


def backward(
    outputs: th.Tensor | Sequence[th.Tensor], *flats: FlatParameters, gradients: Sequence[th.Tensor] | None = None
) -> None:
    """
    As :meth:`FlatParameters.backward`, for several of them in one pass through the graph.

    :param outputs: The loss, a scalar, or what it is computed from
    :param flats: Each gets its gradient
    :param gradients: Of the loss with respect to each of ``outputs`` (None: they are the loss)
    """
    params = list(chain.from_iterable(flat.params for flat in flats))
    grads = iter(differentiate(outputs, params, gradients))
    for flat in flats:
        th.cat([next(grads).reshape(-1) for _ in flat.params], out=flat._gradient())


def differentiate(
    outputs: th.Tensor | Sequence[th.Tensor],
    params: Sequence[th.Tensor],
    gradients: Sequence[th.Tensor] | None = None,
    **kwargs: bool,
) -> list[th.Tensor]:
    """
    :param outputs: The loss, a scalar, or what it is computed from
    :param params: Parameters
    :param gradients: Of the loss with respect to each of ``outputs`` (None: they are the loss)
    :param kwargs: ``retain_graph`` and ``create_graph``, as of ``torch.autograd.grad``
    :return: The gradient with respect to each parameter; zeros for those that do not matter for ``outputs`` or are frozen
    """
    outputs = [outputs] if isinstance(outputs, th.Tensor) else outputs
    pairs = zip(outputs, [None] * len(outputs) if gradients is None else gradients, strict=True)
    differentiable = [pair for pair in pairs if pair[0].requires_grad]
    trained = [param for param in params if param.requires_grad]
    if not differentiable or not trained:
        return [th.zeros_like(param) for param in params]
    ends, end_gradients = zip(*differentiable, strict=True)
    grads = iter(th.autograd.grad(ends, trained, end_gradients, allow_unused=True, materialize_grads=True, **kwargs))
    return [next(grads) if param.requires_grad else th.zeros_like(param) for param in params]
