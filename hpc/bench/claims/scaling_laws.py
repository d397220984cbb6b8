"""Published scaling laws, for audits that need the loss of a model that nobody can train here.

    joint law (arXiv:2502.05172, eq. 4 and 6, table 3): dense models (E = 1) and mixtures of E experts, top-1, each as
    wide as the dense layer; 280 runs, 79 M to 2.7 B active parameters, up to 80 B tokens

        L(N, D, E) = m N^mu + n D^nu + c
        m = a Eh^delta   mu = alpha + gamma ln Eh   n = b Eh^omega   nu = beta + zeta ln Eh
        1/Eh = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max

    Chinchilla (arXiv:2203.15556, eq. 10): L(N, D) = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28, dense

N: active parameters with both embeddings, D: tokens, F = 6 N D FLOPs, L: nats per token of the law's own text and
tokenizer. A law says little outside of the sizes that it was fitted on, and nothing about another text.
"""

import math
from dataclasses import dataclass

E_START, E_MAX = 2.0732, 290.4521
A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
C = 1.3637
JOINT_LAW = "joint MoE scaling law, arXiv:2502.05172, table 3"
CHINCHILLA = "Chinchilla, arXiv:2203.15556, eq. 10"


@dataclass(frozen=True)
class Optimum:
    """The best that a number of FLOPs buys."""

    active_params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """L(N, D) = m N^mu + n D^nu + c, for one number of experts."""

    m: float
    mu: float
    n: float
    nu: float
    c: float

    def loss(self, active_params: float, tokens: float) -> float:
        """Nats per token."""
        return float(self.m * active_params**self.mu + self.n * tokens**self.nu + self.c)

    def optimum(self, flops: float) -> Optimum:
        """The active parameters and tokens with the lowest loss at 6 N D = flops (where both terms' slopes meet)."""
        both = flops / 6
        active = (self.nu * self.n * both**self.nu / (self.mu * self.m)) ** (1 / (self.mu + self.nu))
        return Optimum(active, both / active, self.loss(active, both / active))

    def flops_for(self, loss: float) -> float:
        """FLOPs with which the best model reaches `loss`, to 1e-9 of it."""
        low, high = 1.0, 1e40
        while high / low > 1 + 1e-9:
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = (middle, high) if self.optimum(middle).loss > loss else (low, middle)
        return high


def joint_law(num_experts: int) -> Law:
    """The joint law at one number of experts; 1 is a dense model."""
    start = 1 / (1 / E_START - 1 / E_MAX)
    experts = 1 / (1 / (num_experts - 1 + start) + 1 / E_MAX)
    log = math.log(experts)
    return Law(A * experts**DELTA, ALPHA + GAMMA * log, B * experts**OMEGA, BETA + ZETA * log, C)


def chinchilla() -> Law:
    """Chinchilla's law."""
    return Law(406.4, -0.34, 410.7, -0.28, 1.69)
