"""The steps of a natural gradient, as functions of the product with the (damped) Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th


def conjugate_gradients(
    product: Callable[[th.Tensor], th.Tensor], b: th.Tensor, max_steps: int, tolerance: float = 1e-10
) -> tuple[th.Tensor, th.Tensor]:
    """
    Solve ``A x = b`` for a symmetric positive definite matrix, starting from zero.

    Source: Hestenes and Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems".

    :param product: Multiplies a vector (n,) by A
    :param b: (n,)
    :param max_steps: Largest number of products
    :param tolerance: Stop when the squared norm of the residual is below it
    :return: x and A x, both (n,), up to rounding; what has been found so far if A turns out not to be positive definite, or a
        number is not finite
    """
    x = th.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    residual_norm = residual.dot(residual).item()
    for _ in range(max_steps):
        # Not a number is not above the tolerance either
        if not residual_norm > tolerance:
            break
        image = product(direction)
        curvature = direction.dot(image).item()
        if not 0.0 < curvature < math.inf:
            break
        length = residual_norm / curvature
        x.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        previous_norm, residual_norm = residual_norm, residual.dot(residual).item()
        direction.mul_(residual_norm / previous_norm).add_(residual)
    return x, b - residual


def natural_step(direction: th.Tensor, image: th.Tensor, max_kl: float) -> th.Tensor | None:
    """
    The longest step in a direction that the second-order model of the KL divergence allows: ``1/2 s^T A s = max_kl``
    (TRPO, appendix C).

    :param direction: (n,)
    :param image: Its product with A, the damped Fisher matrix, (n,)
    :param max_kl: In nats
    :return: s, (n,); None if the curvature in this direction is not positive and finite, as for a direction of zero
    """
    curvature = direction.dot(image).item()
    if not 0.0 < curvature < math.inf:
        return None
    return math.sqrt(2 * max_kl / curvature) * direction
