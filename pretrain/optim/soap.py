"""SOAP: AdamW in the eigenbasis of Shampoo's preconditioner, for hidden matrices."""

from typing import Any

import torch
from torch import Tensor

from pretrain.config_optim import Soap as SoapConfig
from pretrain.optim.muon import MatrixOptimizer


class Soap(MatrixOptimizer):
    """SOAP (Vyas et al., arXiv 2409.11321, algorithm 3) with the choices of its authors' code.

    The first step only finds the basis; the momentum is kept in the basis of the parameter; decay
    is AdamW's. The state of a matrix is with its owner, under the parameter's name and the number
    among those fused.
    """

    config: SoapConfig

    def update(self, groups: list[dict[str, Any]]) -> None:
        """As for all matrix optimizers, with the settings of the matrices at hand."""
        roles = self.config.facts.roles or ()
        self._settings = next((group for group in groups if group["role"] in roles), {})
        super().update(groups)

    def on_matrix(self, name: str, matrix: Tensor, number: int) -> Tensor:
        """The update of a matrix: Adam's in the eigenbasis, turned back.

        As in the authors' code the gradient enters the statistics after the step that it makes.
        """
        # Not by whether there is a state: one that was loaded is to be gone on with.
        steps = self._settings["steps"] - 1
        state = self._state_of(name, matrix, number)
        first, second = self._settings["betas"]
        if steps == 0:
            state.gather(matrix, second)
            state.find_basis()
            return torch.zeros_like(matrix)
        state.momentum.lerp_(matrix, 1 - first)
        state.variance.lerp_(state.turned(matrix).square_(), 1 - second)
        update = state.turned(state.momentum).div_(state.variance.sqrt().add_(self.config.epsilon))
        corrected = (1 - second**steps) ** 0.5 / (1 - first**steps)
        update = state.turned_back(update).mul_(corrected)
        state.gather(matrix, second)
        if steps % self.config.every_steps == 0:
            state.follow_basis()
        return update

    def _state_of(self, name: str, matrix: Tensor, number: int) -> "_MatrixState":
        tensors = self.state[name]

        def kept(key: str, *shape: int) -> Tensor:
            key = f"{key}.{number}"
            if key not in tensors:
                # Contiguous, for a checkpoint is read into a flat view.
                tensors[key] = matrix.new_zeros(shape)
            return tensors[key]

        sides = [
            (axis, kept(f"statistics{axis}", side, side), kept(f"basis{axis}", side, side))
            for axis, side in enumerate(matrix.shape)
            if side <= self.config.largest_side
        ]
        moments = [kept(key, *matrix.shape) for key in ("exp_avg", "exp_avg_sq")]
        return _MatrixState(*moments, sides)


class _MatrixState:
    """The moments of a matrix, and for the sides (axes) that are not too long the statistics and
    the basis, whose columns are eigenvectors of the statistics by falling eigenvalue."""

    def __init__(
        self, momentum: Tensor, variance: Tensor, sides: list[tuple[int, Tensor, Tensor]]
    ) -> None:
        self.momentum, self.variance, self._sides = momentum, variance, sides

    def turned(self, matrix: Tensor) -> Tensor:
        """A copy of `matrix` in the eigenbasis."""
        for axis, _, basis in self._sides:
            matrix = basis.T @ matrix if axis == 0 else matrix @ basis
        return matrix if self._sides else matrix.clone()

    def turned_back(self, matrix: Tensor) -> Tensor:
        """What `turned` turned."""
        for axis, _, basis in self._sides:
            matrix = basis @ matrix if axis == 0 else matrix @ basis.T
        return matrix

    def gather(self, gradient: Tensor, beta: float) -> None:
        """Let a gradient enter the statistics."""
        for axis, statistics, _ in self._sides:
            outer = gradient @ gradient.T if axis == 0 else gradient.T @ gradient
            statistics.lerp_(outer, 1 - beta)

    def find_basis(self) -> None:
        """The eigenvectors of the statistics as they are."""
        for _, statistics, basis in self._sides:
            try:
                vectors = torch.linalg.eigh(statistics).eigenvectors
            except torch.linalg.LinAlgError:  # fp32 does not always converge
                vectors = torch.linalg.eigh(statistics.double()).eigenvectors
            basis.copy_(vectors.flip(1))

    def follow_basis(self) -> None:
        """One step of orthogonal iteration, the eigenvectors in the order of their eigenvalues."""
        for axis, statistics, basis in self._sides:
            product = statistics @ basis
            order = (basis * product).sum(0).argsort(descending=True)
            self.variance.copy_(self.variance.index_select(axis, order))
            basis.copy_(torch.linalg.qr(product.index_select(1, order)).Q)
