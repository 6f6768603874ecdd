"""Games against their closed forms: the best discriminator, its loss, divergences by integration; penalties by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from genmodels.gan.losses import DIVERGENCES, SMOOTHED, LossName, adversarial_loss
from genmodels.gan.penalties import gradient_penalty, squared_gradient, zero_centred

GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def gaussian(mean: float, deviation: float) -> Tensor:
    return torch.distributions.Normal(mean, deviation).log_prob(GRID).exp()


P, Q = gaussian(0.5, 1.0), gaussian(-0.5, 1.2)


def integral(values: Tensor) -> float:
    return float(values.sum() * STEP)


def best_outputs(name: LossName, real_target: float = 1.0) -> Tensor:
    """Outputs at each point of the grid that minimise the discriminator's loss there, which is convex: by bisection."""
    game = adversarial_loss(name, real_target)
    low, high = torch.full_like(GRID, -40.0), torch.full_like(GRID, 40.0)
    for _ in range(80):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad((P * game.real(middle) + Q * game.fake(middle)).sum(), middle)
        low, high = torch.where(slope < 0, middle, low).detach(), torch.where(slope < 0, high, middle).detach()
    return low


INNER = (GRID > -3) & (GRID < 3)  # where both densities are large enough to matter


@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
@pytest.mark.parametrize("real_target", [1.0, 0.9])
def test_the_best_discriminator_is_the_ratio_of_densities(name: LossName, real_target: float) -> None:
    """D* = p/(p+q) (Goodfellow et al. 2014, eq. 2); smoothed α·p/(p+q) (Salimans et al. 2016, section 3.4)."""
    found = best_outputs(name, real_target).sigmoid()
    torch.testing.assert_close(found[INNER], (real_target * P / (P + Q))[INNER])


def test_known_values() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    for name in ("minimax", "non_saturating", "relativistic"):
        game = adversarial_loss(name)  # type: ignore[arg-type]
        expected = math.log(2) if name == "relativistic" else 2 * math.log(2)
        torch.testing.assert_close(game.of_discriminator(zero, zero), torch.full((3,), expected))
    assert (adversarial_loss("hinge").of_discriminator(zero, zero) == 2).all()
    squares = adversarial_loss("least_squares")
    assert (squares.of_discriminator(one, zero) == 0).all() and (squares.of_generator(one) == 0).all()
    critic = adversarial_loss("wasserstein")
    assert (critic.of_discriminator(one, 3 * one) == 2).all() and (critic.of_generator(one) == -1).all()
    minimax, saturated = adversarial_loss("minimax"), torch.tensor([-20.0], requires_grad=True)
    minimax.of_generator(saturated).backward()
    assert saturated.grad is not None and saturated.grad.abs() < 1e-6, "it saturates"
    saturated.grad = None
    adversarial_loss("non_saturating").of_generator(saturated).backward()
    assert saturated.grad is not None and saturated.grad == pytest.approx(-1, abs=1e-6)  # type: ignore[comparison-overlap]


def test_pairs_are_compared_with_each_other() -> None:
    game, real, fake = adversarial_loss("relativistic"), torch.tensor([1.0, 5.0]), torch.tensor([0.0, 7.0])
    expected = torch.nn.functional.softplus(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(game.of_discriminator(real, fake), expected)
    torch.testing.assert_close(game.of_discriminator(real + 9, fake + 9), expected)
    torch.testing.assert_close(game.of_generator(fake, real), torch.nn.functional.softplus(torch.tensor([1.0, -2.0])))


DIRECT = {
    "f_kl": lambda: integral(P * (P / Q).log()),
    "f_reverse_kl": lambda: integral(Q * (Q / P).log()),
    "f_jensen_shannon": lambda: integral(P * (2 * P / (P + Q)).log() + Q * (2 * Q / (P + Q)).log()),
    "f_pearson": lambda: integral((P - Q).square() / Q),
    "f_total_variation": lambda: integral((P - Q).abs()) / 2,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_at_its_optimum_each_bound_is_the_divergence(name: str) -> None:
    divergence = DIVERGENCES[name]
    optimum = divergence.optimum(P / Q)
    bound = integral(P * optimum - Q * divergence.conjugate(optimum))
    assert bound == pytest.approx(DIRECT[name](), rel=1e-6)
    # Any other outputs give a lower one, and the activation leaves the conjugate's domain nowhere.
    for outputs in (torch.zeros_like(GRID), GRID.sin(), 3 * torch.ones_like(GRID), -3 * torch.ones_like(GRID)):
        t = divergence.activation(outputs)
        other = integral(P * t - Q * divergence.conjugate(t))
        assert math.isfinite(other) and other < bound + 1e-9
        game = adversarial_loss(name)  # type: ignore[arg-type]
        assert integral(P * game.real(outputs) + Q * game.fake(outputs)) == pytest.approx(-other, rel=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_drawn_outputs_far_out_are_neither_infinite_nor_without_gradient(name: str) -> None:
    """f* after g_f is one function, which is written as such: step by step it would overflow."""
    divergence = DIVERGENCES[name]
    near = torch.linspace(-6, 6, 49, dtype=torch.float64)
    torch.testing.assert_close(divergence.of_drawn(near), divergence.conjugate(divergence.activation(near)))
    far = torch.tensor([-50.0, 50.0], requires_grad=True)
    divergence.of_drawn(far).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all()
    if name in ("f_jensen_shannon", "f_reverse_kl"):
        assert float(far.grad[1]) == 1.0


@pytest.mark.parametrize("name", get_args(LossName))
@pytest.mark.parametrize("real_target", [1.0, 0.9])
def test_the_border_is_what_the_best_discriminator_says_where_both_are_as_likely(
    name: LossName, real_target: float
) -> None:
    if real_target != 1 and name not in SMOOTHED:
        return
    game = adversarial_loss(name, real_target)
    said = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    if game.border is None:
        assert game.paired or name == "wasserstein"
        return
    cost = game.real(said) + game.fake(said)
    lowest = cost - cost.min() < 1e-9  # a range, for losses whose best answer is any of several
    assert float(said[lowest].min()) - 1e-3 <= game.border <= float(said[lowest].max()) + 1e-3


@pytest.mark.parametrize("name", ["f_kl", "f_reverse_kl", "f_jensen_shannon", "f_pearson"])
def test_the_best_outputs_are_the_optimum_of_each_divergence(name: LossName) -> None:
    found = DIVERGENCES[name].activation(best_outputs(name))
    torch.testing.assert_close(found[INNER], DIVERGENCES[name].optimum(P / Q)[INNER])


def test_a_critic_of_slope_1_measures_the_distance_of_two_gaussians() -> None:
    """W₁ of two Gaussians of equal deviation is the distance of their means."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, generator=generator)
    real, fake = noise + 1.5, noise
    critic = adversarial_loss("wasserstein").of_discriminator(real, fake).mean()  # D(x) = x is 1-Lipschitz
    assert -float(critic) == pytest.approx(1.5, abs=1e-4)
    assert wasserstein_distance(real.numpy(), fake.numpy()) == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize("name", get_args(LossName))
def test_the_generator_is_pulled_towards_what_is_called_real(name: LossName) -> None:
    """At outputs that are not saturated, every generator's loss falls as its image's score rises."""
    fake = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    adversarial_loss(name).of_generator(fake, torch.zeros(3)).sum().backward()
    assert fake.grad is not None and (fake.grad < 0).all()


def test_only_losses_with_a_target_can_be_smoothed() -> None:
    for name in get_args(LossName):
        if name in SMOOTHED:
            adversarial_loss(name, 0.9)
        else:
            with pytest.raises(ValueError, match=f"{name} has no target to soften"):
                adversarial_loss(name, 0.9)
    with pytest.raises(ValueError, match="there is no loss 'magic', only minimax"):
        adversarial_loss("magic")  # type: ignore[arg-type]


WEIGHTS = torch.randn(3 * 4 * 4, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def linear(images: Tensor) -> Tensor:
    return images.flatten(1) @ WEIGHTS


def test_penalties_of_a_linear_critic_are_known() -> None:
    """R1 is γ‖w‖²/2, and the gradient penalty λ(‖w‖−1)², wherever they are measured."""
    norm = float(WEIGHTS.norm())
    torch.testing.assert_close(squared_gradient(linear, IMAGES), torch.full((5,), norm**2))
    torch.testing.assert_close(zero_centred(linear, IMAGES, 10.0), torch.full((5,), 5 * norm**2))
    found = gradient_penalty(linear, IMAGES, IMAGES.flip(0), torch.arange(5), 10.0)
    torch.testing.assert_close(found, torch.full((5,), 10 * (norm - 1) ** 2))


def test_the_gradient_penalty_is_measured_between_pairs() -> None:
    seen: list[Tensor] = []

    def watch(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return linear(images)

    real, fake = torch.zeros(200, 3, 4, 4), torch.ones(200, 3, 4, 4)
    gradient_penalty(watch, real, fake, torch.arange(200), 1.0)
    shares = 1 - seen[0].flatten(1)
    assert (shares == shares[:, :1]).all(), "one share for a whole image"
    assert ((shares > 0) & (shares < 1)).all() and abs(float(shares.mean()) - 0.5) < 0.05


def test_a_penalty_can_be_minimised_and_a_flat_critic_has_none() -> None:
    slope = torch.tensor(3.0, requires_grad=True)
    for penalty in (
        lambda: zero_centred(lambda x: slope * linear(x), IMAGES, 1.0),
        lambda: gradient_penalty(lambda x: slope * linear(x), IMAGES, IMAGES.flip(0), torch.arange(5), 1.0),
    ):
        (gradient,) = torch.autograd.grad(penalty().sum(), slope)
        assert gradient > 0
    flat = gradient_penalty(lambda x: 0.0 * x.flatten(1).sum(1), IMAGES, IMAGES, torch.arange(5), 2.0)
    torch.testing.assert_close(flat, torch.full((5,), 2.0))
