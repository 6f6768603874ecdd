"""What discriminator and generator minimise, as functions of the discriminator's outputs for real and drawn images.

Goodfellow et al., "Generative Adversarial Nets" (2014): minimax and non-saturating. Nowozin, Cseke and Tomioka,
"f-GAN: Training Generative Neural Samplers using Variational Divergence Minimization" (2016), tables 1 and 2: the
f-divergences. Mao et al., "Least Squares Generative Adversarial Networks" (2017), eq. 9. Lim and Ye, "Geometric GAN"
(2017): hinge. Arjovsky, Chintala and Bottou, "Wasserstein GAN" (2017). Jolicoeur-Martineau, "The relativistic
discriminator" (2019), in the pairing of Huang et al., "The GAN is dead; long live the GAN!" (2024), eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

LossName = Literal[
    "minimax",
    "non_saturating",
    "least_squares",
    "hinge",
    "wasserstein",
    "relativistic",
    "f_kl",
    "f_reverse_kl",
    "f_jensen_shannon",
    "f_pearson",
    "f_total_variation",
]
SMOOTHED = ("minimax", "non_saturating", "least_squares")  # have a target for real images, which can be softened
_Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AdversarialLoss:
    """The two losses of a game, sample by sample; outputs of the discriminator are (batch,) and any number.

    Attributes:
        real, fake: parts of the discriminator's loss, of its outputs for real and for drawn images.
        generator: the generator's loss, of the outputs for its images.
        paired: outputs for real and drawn images are compared in pairs: `real` is of their difference, and so is
            `generator`, the other way round; `fake` adds nothing.
        border: what the best discriminator says of an image that is as likely drawn as real; None where it may say
            anything, as only differences count.
    """

    real: _Score
    fake: _Score
    generator: _Score
    paired: bool = False
    border: float | None = None

    def of_discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """(batch,), to be minimised by the discriminator."""
        return self.real(real - fake) if self.paired else self.real(real) + self.fake(fake)

    def of_generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """(batch,), to be minimised by the generator; `real` is needed where outputs are paired."""
        if not self.paired:
            return self.generator(fake)
        assert real is not None
        return self.generator(fake - real)


def adversarial_loss(name: LossName, real_target: float = 1.0) -> AdversarialLoss:
    """The losses of a name.

    Args:
        name: see the module's sources. The f-divergences' generators maximise the activated output (Nowozin et al.,
            section 3.2), which has the same fixed point as the minimum and keeps a gradient where images are told
            apart with ease; that of total variation has none to give there, by either rule.
        real_target: of SMOOTHED losses, what the discriminator should say of a real image: 0.9 is one-sided label
            smoothing (Salimans et al., "Improved Techniques for Training GANs", 2016, section 3.4).

    Raises:
        ValueError: there is no loss of that name, or it has no target to soften.
    """
    if name not in get_args(LossName):
        raise ValueError(f"there is no loss {name!r}, only {', '.join(get_args(LossName))}")
    if real_target != 1 and name not in SMOOTHED:
        raise ValueError(f"label smoothing is of losses {', '.join(SMOOTHED)}: {name} has no target to soften")

    def of_logistic(v: Tensor) -> Tensor:
        return real_target * softplus(-v) + (1 - real_target) * softplus(v)

    logistic_border = math.log(real_target / (2 - real_target))
    match name:
        case "minimax":
            return AdversarialLoss(of_logistic, softplus, lambda v: -softplus(v), border=logistic_border)
        case "non_saturating":
            return AdversarialLoss(of_logistic, softplus, lambda v: softplus(-v), border=logistic_border)
        case "least_squares":
            return AdversarialLoss(
                lambda v: (v - real_target).square() / 2,
                lambda v: v.square() / 2,
                lambda v: (v - 1).square() / 2,
                border=real_target / 2,
            )
        case "hinge":
            return AdversarialLoss(lambda v: relu(1 - v), lambda v: relu(1 + v), lambda v: -v, border=0.0)
        case "wasserstein":
            return AdversarialLoss(lambda v: -v, lambda v: v, lambda v: -v)
        case "relativistic":
            return AdversarialLoss(
                lambda d: softplus(-d), lambda v: torch.zeros_like(v), lambda d: softplus(-d), paired=True
            )
    divergence = DIVERGENCES[name]
    return AdversarialLoss(
        lambda v: -divergence.activation(v),
        divergence.of_drawn,
        lambda v: -divergence.activation(v),
        border=divergence.border,
    )


@dataclass(frozen=True)
class Divergence:
    """An f-divergence D(P‖Q) = ∫ q f(p/q) by its variational bound E_P[t] − E_Q[f*(t)].

    Attributes:
        activation: g_f, maps any number to the domain of f*.
        conjugate: f*.
        of_drawn: f* of the activated output, simplified: step by step its logarithms and exponentials would overflow.
        optimum: t of the ratio p/q at which the bound is tight: f'(p/q).
        border: what is activated to f'(1).
    """

    activation: _Score
    conjugate: _Score
    of_drawn: _Score
    optimum: _Score
    border: float = 0.0


DIVERGENCES = {
    "f_kl": Divergence(
        lambda v: v, lambda t: (t - 1).exp(), lambda v: (v - 1).exp(), lambda u: 1 + u.log(), border=1.0
    ),
    "f_reverse_kl": Divergence(lambda v: -(-v).exp(), lambda t: -1 - (-t).log(), lambda v: v - 1, lambda u: -1 / u),
    "f_jensen_shannon": Divergence(
        lambda v: math.log(2) - softplus(-v),
        lambda t: -(2 - t.exp()).log(),
        lambda v: softplus(v) - math.log(2),
        lambda u: (2 * u / (u + 1)).log(),
    ),
    "f_pearson": Divergence(
        lambda v: v, lambda t: t.square() / 4 + t, lambda v: v.square() / 4 + v, lambda u: 2 * (u - 1)
    ),
    "f_total_variation": Divergence(
        lambda v: v.tanh() / 2, lambda t: t, lambda v: v.tanh() / 2, lambda u: (u - 1).sign() / 2
    ),
}
