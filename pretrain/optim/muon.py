"""Muon: orthogonalised momentum for hidden matrices, AdamW for everything else."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain.config_optim import Muon as MuonConfig
from pretrain.config_optim import OptimizerSection
from pretrain.optim import rules
from pretrain.optim.base import ShardedOptimizer
from pretrain.optim.kernels import apply
from pretrain.optim.matrices import WholeMatrices
from pretrain.optim.shards import Shards


class MatrixOptimizer(ShardedOptimizer):
    """Updates the matrices of its roles as wholes and all other parameters by AdamW."""

    def __init__(self, shards: Shards, config: OptimizerSection) -> None:
        super().__init__(shards, config)
        roles = config.facts.roles or ()
        self.matrices = WholeMatrices(shards, roles, config.split_qkv)  # type: ignore[attr-defined]

    def update(self, groups: list[dict[str, Any]]) -> None:
        """Directions, whole matrices at their owners, then the step."""
        roles = self.config.facts.roles or ()
        matrix_groups = [group for group in groups if group["role"] in roles]
        flats = {}
        for group in matrix_groups:
            for master in group["params"]:
                self.direct(master, group)
                flats[master] = master.grad
        # Ranks that hold no fragment of a matrix may own one, so all take part.
        self.matrices.replace(flats, self.on_matrix)
        for group in groups:
            for master in group["params"]:
                if group["role"] in roles:
                    rate = group["lr"]
                    scalars = (1 - rate * group["weight_decay"], rate)
                    apply(rules.decay_and_subtract, [master, master.grad], scalars, (0,))
                else:
                    self._adamw(master, group)

    def direct(self, master: Tensor, group: dict[str, Any]) -> None:
        """Turn the gradient into what is sent to the owners."""

    def on_matrix(self, name: str, matrix: Tensor, number: int) -> Tensor:
        """The update of a matrix, at its owner."""
        raise NotImplementedError

    def _adamw(self, master: Tensor, group: dict[str, Any]) -> None:
        moments = [[state] for state in self.states_of(master, ("exp_avg", "exp_avg_sq"))]
        # The functional form counts the step itself.
        steps = torch.full((), group["steps"] - 1.0, device=master.device)
        first, second = self.config.adamw_betas  # type: ignore[attr-defined]
        adamw(
            [master], [master.grad], *moments, [], [steps], fused=True, amsgrad=False,
            beta1=first, beta2=second, lr=group["lr"] * self.config.adamw_rate,  # type: ignore[attr-defined]
            weight_decay=group["weight_decay"], eps=self.config.adamw_epsilon,  # type: ignore[attr-defined]
            maximize=False,
        )  # fmt: skip


class Muon(MatrixOptimizer):
    """Muon (Jordan et al. 2024): the momentum's nearest orthogonal matrix, by Newton and Schulz.

    Scales are those of torch.optim.Muon, "rms" being Moonshot's (arXiv 2502.16982, equation 4).
    """

    config: MuonConfig

    def direct(self, master: Tensor, group: dict[str, Any]) -> None:
        """m <- mu m + (1 - mu) g; Nesterov: (1 - mu) g + mu m."""
        (momentum,) = self.states_of(master, ("momentum_buffer",))
        mu = group["betas"][0]
        rule = rules.muon_nesterov if self.config.nesterov else rules.muon
        apply(rule, [master.grad, momentum], (mu, 1 - mu), (0, 1))

    def on_matrix(self, name: str, matrix: Tensor, number: int) -> Tensor:
        """The orthogonalised momentum, scaled by the matrix's shape."""
        rows, columns = matrix.shape
        if self.config.scale == "rms":
            scale = 0.2 * max(rows, columns) ** 0.5
        else:
            scale = max(1.0, rows / columns) ** 0.5
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        return (
            orthogonalise(matrix.to(dtype), self.config.iterations, self.config.coefficients)
            .float()
            .mul_(scale)
        )


def orthogonalise(
    matrix: Tensor, iterations: int, coefficients: tuple[float, float, float]
) -> Tensor:
    """About U V^T of `matrix` = U S V^T: Newton and Schulz's iteration with the coefficients of
    Jordan et al., which bring singular values near 1, in the matrix's own type."""
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
