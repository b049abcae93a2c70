"""Adam in the eigenbasis of its gradients: what late gradients disturb least, after Muon.

Delay hurts along directions in which the gradient turns quickly, and Adam, which scales each coordinate, can only damp
such a direction if it is a coordinate. *Basis rotation* (arXiv 2602.03515, ICML 2026; the optimizer itself is that of
SOAP, Vyas et al., 2024) makes it one: for a matrix W with the gradient G

    L, R   running means of G G^T and G^T G;   U, V   their eigenvectors, refreshed every few steps
    M      running mean of G;                  S      running mean of (U^T G V)^2
    W     -= lr U (U^T M V / (sqrt(S) + eps)) V^T

with the corrections of Adam for the first steps, and its decoupled weight decay. All that is no matrix goes by AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BasisRotation"]

_SIDES = "left", "right"
"""The keys of the means of G G^T and G^T G in the state of a matrix."""


class BasisRotation(torch.optim.Optimizer):
    """AdamW, in a rotated basis for each matrix; in fp32, as wrappers that flatten matrices leave none.

    Args:
        params: as for any optimizer.
        lr: learning rate.
        betas: decays of the mean of the gradients, and of their squares and products.
        eps: added to the denominator.
        weight_decay: decoupled, as AdamW's.
        refresh: steps after which the eigenvectors are followed by one step of the QR iteration.
        largest: a side of a matrix with more entries is not rotated (its basis has their square); embeddings and
            heads are such.

    Raises:
        ValueError: `refresh` or `largest` is below 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        refresh: int = 10,
        largest: int = 4096,
    ) -> None:
        for name, value in (("refresh", refresh), ("largest", largest)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value!r}")
        self._given: set[Tensor] = set()
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "refresh": refresh,
                "largest": largest,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        self._given.update(self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on the gradients of the parameters that have one.

        Raises:
            RuntimeError: the parameters have been replaced since, as bf16, fp16 and ZeRO do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._step(group, parameter, parameter.grad)
        return loss

    def _step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        if parameter not in self._given:
            raise RuntimeError(
                "BasisRotation was given other parameters than it is to step: bf16, fp16 and ZeRO flatten matrices, "
                "which have no basis then; train in fp32 (or with torch_autocast), without ZeRO"
            )
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        steps, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        left, right = self._bases(group, state, gradient) if gradient.dim() == 2 else (None, None)
        rotated = _rotate(left, gradient, right)
        square.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        scale = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        update = _rotate(left, mean, right) / scale / (1 - beta1**steps)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(_rotate(left, update, right, back=True), alpha=group["lr"])

    def _bases(self, group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> list[Tensor | None]:
        """Return the present eigenvectors on either side; None for a side that is too large."""
        bases: list[Tensor | None] = []
        for dim, factor in enumerate((gradient, gradient.mT)):
            side, decay = _SIDES[dim], group["betas"][1]
            if factor.shape[0] > group["largest"]:
                bases.append(None)
                continue
            product = factor @ factor.mT
            if side not in state:
                state[side] = product * (1 - decay)
                # The iteration below keeps the order from the largest eigenvalue on alone.
                state[f"{side}_basis"] = torch.linalg.eigh(state[side]).eigenvectors.flip(1)
            else:
                state[side].lerp_(product, 1 - decay)
                if (state["step"] - 1) % group["refresh"] == 0:
                    self._refresh(state, side, dim)
            bases.append(state[f"{side}_basis"])
        return bases

    def _refresh(self, state: dict[str, Any], side: str, dim: int) -> None:
        """One step of the QR iteration, after which the eigenvectors are in the order of their eigenvalues again."""
        basis = state[f"{side}_basis"]
        followed = state[side] @ basis
        order = (basis * followed).sum(0).argsort(descending=True)
        state[f"{side}_basis"] = torch.linalg.qr(followed[:, order]).Q
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(dim, order))


def _rotate(left: Tensor | None, matrix: Tensor, right: Tensor | None, back: bool = False) -> Tensor:
    """U^T X V, or back U X V^T, with the sides that there are."""
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    if right is not None:
        matrix = matrix @ (right.mT if back else right)
    return matrix
