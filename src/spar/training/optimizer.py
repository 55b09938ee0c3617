"""The optimizer of a stage: AdamW as the paper has it, or Muon for matrices with AdamW for everything else.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") steps along the nearest
orthogonal matrix of the momentum, found by Newton-Schulz iteration. torch's own Muon takes two-dimensional parameters
only; SANA keeps most of its weights in 1x1 convolutions, hence this one, which also batches matrices of one shape.
"""

import fnmatch
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spar.common.device import native_dtype
from spar.training.config import StageConfig, matches

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero (Jordan et al.)
ITERATIONS = 5
MOMENTUM = 0.95
NOT_HIDDEN = ("*.proj_out.*", "*.time_embed.*")  # outputs that start at zero, and tables of modulation
ADAMW_RMS = 0.2  # root mean square of an AdamW update; with it one learning rate serves both (Liu et al. 2025)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; parameters of more than two dimensions count as [first, rest]."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # nothing is returned
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter]["momentum"]
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                alike[tuple(update.shape)].append((parameter, update))
            for (rows, columns), pairs in alike.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                size = ADAMW_RMS * math.sqrt(max(rows, columns))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About the nearest matrices with singular values of one: `[n, R, C]` to `[n, R, C]`, computed in
    bfloat16 if the device has it in hardware.
    """
    a, b, c = NEWTON_SCHULZ
    turned = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if turned else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(native_dtype(matrices.device))
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if turned else x).to(matrices.dtype)


def build_optimizers(module: nn.Module, stage: StageConfig) -> list[torch.optim.Optimizer]:
    """The stage's optimizers, one group for each learning-rate factor; vectors and scalars never decay.

    With Muon, AdamW keeps what is no map between hidden states: embeddings, norms, biases,
    tables, the encoder's patches and what NOT_HIDDEN names.
    All state is there from the start, also where no gradient will come: so a saved one can be checked key by key.
    """
    matrices = {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1 and part.in_channels > 3)
    }
    groups: dict[bool, dict[tuple[float, bool], dict[str, Any]]] = {True: {}, False: {}}  # whether Muon steps them
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = next((rate for pattern, rate in stage.lr_multipliers if fnmatch.fnmatchcase(name, pattern)), 1.0)
            hidden = id(parameter) in matrices and not matches(name, NOT_HIDDEN)
            muon = hidden and stage.optimizer == "muon"
            decays = parameter.dim() > 1
            group = {"params": [], "factor": factor, "weight_decay": stage.weight_decay if decays else 0.0}
            groups[muon].setdefault((factor, decays), group)["params"].append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if groups[False]:
        adamw = torch.optim.AdamW([*groups[False].values()], lr=stage.lr, betas=stage.betas, fused=True)
        for parameter in (parameter for group in adamw.param_groups for parameter in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        optimizers.append(adamw)
    if groups[True]:
        optimizers.append(Muon([*groups[True].values()], lr=stage.lr))
    return optimizers
