import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_fisher import explicit_fisher_matrix, flat_actor, make_policy

from sb3_ext.common.fisher import linearize
from sb3_ext.common.natural_gradient import conjugate_gradients, natural_step


def positive_definite(n=6):
    root = th.randn(n, n, generator=th.Generator().manual_seed(0), dtype=th.float64)
    return root @ root.T + 0.1 * th.eye(n, dtype=th.float64)


def test_conjugate_gradients_solve_the_equation():
    matrix, b = positive_definite(), th.arange(6.0, dtype=th.float64)
    x, image = conjugate_gradients(matrix.mv, b, max_steps=20, tolerance=1e-20)
    th.testing.assert_close(image, matrix.mv(x))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-6)


def test_conjugate_gradients_start_from_zero_and_stop():
    matrix, b = positive_definite(), th.arange(6.0, dtype=th.float64)
    products = []

    def product(vector):
        products.append(vector.clone())
        return matrix.mv(vector)

    # The first step is one of steepest descent from zero
    x, image = conjugate_gradients(product, b, max_steps=1)
    th.testing.assert_close(image, matrix.mv(x))
    th.testing.assert_close(x, b * b.dot(b) / b.dot(matrix.mv(b)))
    assert len(products) == 1 and th.equal(products[0], b)
    conjugate_gradients(product, b, max_steps=50, tolerance=1e-3)
    assert len(products) < 20
    assert th.equal(conjugate_gradients(product, th.zeros_like(b), max_steps=5)[0], th.zeros_like(b))


@pytest.mark.parametrize("matrix", [-th.eye(3), th.full((3, 3), math.nan), th.zeros(3, 3)], ids=["negative", "nan", "zero"])
def test_conjugate_gradients_keep_what_they_have(matrix):
    assert th.equal(conjugate_gradients(matrix.mv, th.ones(3), max_steps=5)[0], th.zeros(3))


def test_conjugate_gradients_keep_the_first_step_when_the_second_direction_has_negative_curvature():
    matrix, b = th.tensor([[1.0, 0.0], [0.0, -1.0]]), th.tensor([2.0, 1.0])
    # One step of steepest descent: b times 5 / 3
    th.testing.assert_close(conjugate_gradients(matrix.mv, b, max_steps=5)[0], b * 5 / 3)


def test_conjugate_gradients_keep_the_first_step_when_the_second_product_is_not_a_number():
    matrix, b = positive_definite(), th.arange(6.0, dtype=th.float64)
    factors = iter([1.0, math.nan])
    x, _ = conjugate_gradients(lambda vector: next(factors) * matrix.mv(vector), b, max_steps=5)
    th.testing.assert_close(x, conjugate_gradients(matrix.mv, b, max_steps=1)[0])


def test_conjugate_gradients_draw_no_random_numbers():
    state = th.get_rng_state()
    conjugate_gradients(positive_definite().mv, th.ones(6, dtype=th.float64), max_steps=5)
    assert th.equal(state, th.get_rng_state())


def test_step_has_the_divergence_that_is_allowed():
    matrix, direction = positive_definite(), th.arange(6.0, dtype=th.float64)
    step = natural_step(direction, matrix.mv(direction), max_kl=0.02)
    assert 0.5 * step.dot(matrix.mv(step)).item() == pytest.approx(0.02)
    assert th.nn.functional.cosine_similarity(step, direction, dim=0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("curvature", [-1.0, 0.0, math.inf, math.nan])
def test_no_step_without_positive_finite_curvature(curvature):
    assert natural_step(th.ones(3), th.full((3,), curvature), max_kl=0.01) is None


@pytest.mark.parametrize("action_space", [spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(3)], ids=["Box", "Discrete"])
def test_direction_equals_that_of_a_dense_solve(action_space):
    policy = make_policy(action_space)
    flat, damping = flat_actor(policy), 0.01
    generator = th.Generator().manual_seed(2)
    observations = th.randn(40, 3, generator=generator)
    actor = linearize(policy, flat, observations)
    actions = actor.distribution.mode().detach()
    gradient = actor.gradient((actor.distribution.log_prob(actions) * th.randn(40, generator=generator)).mean())
    n = len(gradient)
    direction, _ = conjugate_gradients(lambda v: actor.fisher_product(v) + damping * v, gradient, 3 * n, tolerance=1e-14)
    matrix = explicit_fisher_matrix(policy, observations) + damping * th.eye(n, dtype=th.float64)
    expected = th.linalg.solve(matrix, gradient.double())
    assert (direction.double() - expected).norm() < 1e-4 * expected.norm()
