"""Residual vector quantisation (RQ-VAE, arXiv 2203.01941) with codebooks that follow an average of their vectors.

    r_1 = x;  k_d = argmin_k |r_d - e_d(k)|^2;  r_{d+1} = r_d - e_d(k_d);  the quantised vector is sum_d e_d(k_d)

No gradient reaches a codebook: an entry is the moving average of the vectors that chose it. The average moves once a
step, after the last depth and the optimizer (`update`), never inside a depth: the codes of training are those of
evaluation, and a shared codebook decays once a step and not once a depth.
V vectors, C their width, D depths, K entries, J tables (1 if shared, else D).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spar.common.autocast import without_autocast
from spar.models.dualtoken.config import QuantizerConfig

RESTART_GRACE = 2.0  # a restarted entry's count, in multiples of that below which it would restart again
MAX_DISTANCES = 2**26  # distances that are held at once
INIT_ROUNDS = 4  # of Lloyd's algorithm for each table that data begins

Combine = Callable[[Tensor], Tensor]  # of one process's tensor with the others' (a sum, or rows one after the other)


@dataclass(frozen=True)
class Quantized:
    """Codes and vectors of `[..., C]`.

    Attributes:
        codes: int64 `[..., D]`.
        vectors: the sum of the codes' entries `[..., C]`, with the gradient of the input (straight-through).
        commitment: the mean over depths of |x - sg(partial sum)|^2, over vectors and channels too; a float32 scalar.
    """

    codes: Tensor
    vectors: Tensor
    commitment: Tensor


@dataclass
class StepStatistics:
    """What the vectors of a step leave for the codebook's update: of each table the number of vectors that chose an
    entry `counts` `[J, K]` and their sum `sums` `[J, K, C]`; vectors that may replace unused entries, `candidates`
    `[J, R, C]`, and their `priorities` `[J, R]`, the highest first.
    """

    counts: Tensor
    sums: Tensor
    candidates: Tensor
    priorities: Tensor

    def add(self, other: "StepStatistics", limit: int) -> "StepStatistics":
        """Both together, with the `limit` best candidates."""
        candidates = torch.cat([self.candidates, other.candidates], dim=1)
        priorities = torch.cat([self.priorities, other.priorities], dim=1)
        best = best_candidates(candidates, priorities, limit)
        return StepStatistics(self.counts + other.counts, self.sums + other.sums, *best)

    def combine(self, total: Combine, gather: Combine, limit: int) -> "StepStatistics":
        """Those of all processes: `total` adds a tensor up over them, `gather` puts its rows one after the other."""
        candidates = gather(self.candidates.transpose(0, 1)).transpose(0, 1)
        priorities = gather(self.priorities.transpose(0, 1)).transpose(0, 1)
        best = best_candidates(candidates, priorities, limit)
        return StepStatistics(total(self.counts), total(self.sums), *best)


def best_candidates(candidates: Tensor, priorities: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The candidates `[J, R, C]` of the highest priorities `[J, R]`, in their order, at most `limit`."""
    priorities, order = priorities.topk(min(limit, priorities.shape[1]), dim=1)
    return candidates.gather(1, order[..., None].expand(-1, -1, candidates.shape[2])), priorities


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """The entry `[V]` of a table `[K, C]` that is nearest to each vector `[V, C]`, by squared L2 in float32."""
    squares, found = table.square().sum(1), []
    for chunk in vectors.split(max(1, MAX_DISTANCES // len(table))):
        found.append(torch.addmm(squares, chunk, table.T, alpha=-2).argmin(1))
    return torch.cat(found)


class ResidualQuantizer(nn.Module):
    """`[..., C]` to `depth` codes and their sum. Buffers: the tables `codebook` `[J, K, C]` and their averages."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        tables = 1 if config.codebook == "shared" else config.depth
        self.register_buffer("codebook", torch.zeros(tables, config.entries, config.width))
        self.register_buffer("counts", torch.zeros(tables, config.entries))
        self.register_buffer("sums", torch.zeros(tables, config.entries, config.width))
        self.step: StepStatistics | None = None  # of this process's micro-batches since the last update

    def table(self, depth: int) -> Tensor:
        """The entries `[K, C]` of a depth, from 0."""
        return self.codebook[depth % len(self.codebook)]

    def encode(self, x: Tensor) -> Tensor:
        """`[..., C]` to codes `[..., D]`, in float32 whatever the type of `x`."""
        with torch.no_grad(), without_autocast(x):
            vectors = x.detach().float().reshape(-1, x.shape[-1])
            codes = torch.stack([codes for _, codes in self._depths(vectors)], dim=1)
        return codes.unflatten(0, x.shape[:-1])

    def _depths(self, vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each depth the residuals `[V, C]` before it and the codes `[V]`."""
        for depth in range(self.config.depth):
            table = self.table(depth)
            codes = nearest(vectors, table)
            yield vectors, codes
            vectors = vectors - table[codes]

    def partial_sums(self, codes: Tensor) -> Tensor:
        """The running sums of codes' entries `[..., D, C]` from codes `[..., D]`, or of the first few depths alone."""
        entries = [self.table(depth)[codes[..., depth]] for depth in range(codes.shape[-1])]
        return torch.stack(entries, dim=-2).cumsum(-2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[..., D]` to quantised vectors `[..., C]`."""
        return self.partial_sums(codes)[..., -1, :]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Quantized:
        """Quantise `[..., C]`.

        Args:
            noise: Gumbel noise `[..., D]`, which chooses the vectors that may replace unused entries: the vectors are
                then remembered for `update`. It is drawn by the caller for a whole batch, so that the same are chosen
                at every number of processes. None: nothing is remembered.
        """
        codes = self.encode(x)
        partial = self.partial_sums(codes)                                     # [..., D, C]
        commitment = (x.float()[..., None, :] - partial).square().mean()
        if noise is not None:
            self._remember(x.detach().float().flatten(0, -2), codes.flatten(0, -2), noise.flatten(0, -2))
        vectors = partial[..., -1, :] + (x - x.detach()).float()               # exactly the entries' sum
        return Quantized(codes, vectors, commitment)

    @torch.no_grad()
    def _remember(self, vectors: Tensor, codes: Tensor, noise: Tensor) -> None:
        """Add a micro-batch's vectors `[V, C]` with their codes and noise `[V, D]` to the step's statistics."""
        with without_autocast(vectors):
            before = torch.cat([vectors.new_zeros(len(vectors), 1, vectors.shape[1]), self.partial_sums(codes)], dim=1)
            residuals = vectors[:, None] - before                              # [V, D + 1, C]
            errors = residuals[:, 1:].square().sum(2)                          # [V, D]
            tables, depths = len(self.codebook), self.config.depth
            own = depths // tables                                             # depths of one table
            # [V, D] as [J, V * own]: of each table the vectors of all its depths
            chosen = codes.view(-1, own, tables).permute(2, 0, 1).reshape(tables, -1)
            members = residuals[:, :-1].unflatten(1, (own, tables)).permute(2, 0, 1, 3).flatten(1, 2)
            weight = (errors.clamp(min=1e-20).log() + noise).view(-1, own, tables).permute(2, 0, 1).reshape(tables, -1)
            counts, sums = self.counts.new_zeros(self.counts.shape), self.sums.new_zeros(self.sums.shape)
            counts.scatter_add_(1, chosen, torch.ones_like(weight))
            sums.scatter_add_(1, chosen[..., None].expand_as(members), members)
            step = StepStatistics(counts, sums, *best_candidates(members, weight, self.config.entries))
            self.step = step if self.step is None else self.step.add(step, self.config.entries)

    @torch.no_grad()
    def update(self, total: Combine = lambda own: own, gather: Combine = lambda own: own) -> None:
        """Move the averages by one step and replace entries that are hardly used by vectors of the step.

        A vector becomes an entry in proportion to its error. Every process calls this, with the same vectors
        remembered in number; the result is that of one process with all of them.

        Args:
            total: adds a tensor up over the processes.
            gather: puts the rows of all processes one after the other.
        """
        if self.step is None:
            raise ValueError("expected vectors since the last update: a forward pass with noise")
        step, self.step = self.step.combine(total, gather, self.config.entries), None
        decay = self.config.decay
        self.counts.mul_(decay).add_(step.counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(step.sums, alpha=1 - decay)
        self._set_entries(self.counts > 0)
        self._restart(step)

    def _set_entries(self, which: Tensor) -> None:
        """The entries that are marked `[J, K]` become their averages, with Laplace-smoothed counts."""
        eps, entries = self.config.eps, self.config.entries
        whole = self.counts.sum(1, keepdim=True)
        smoothed = (self.counts + eps) / (whole + entries * eps) * whole
        means = self.sums / smoothed.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        self.codebook.copy_(torch.where(which[..., None], means, self.codebook))

    def _restart(self, step: StepStatistics) -> None:
        """Candidates in the place of unused entries, as many as there are."""
        least = self.config.restart_share * self.counts.mean(1, keepdim=True)
        unused = self.counts <= least                                          # [J, K]
        rank = unused.cumsum(1) - 1
        replaced = unused & (rank < step.candidates.shape[1])
        chosen = rank.clamp(0, step.candidates.shape[1] - 1)
        vectors = step.candidates.gather(1, chosen[..., None].expand_as(self.codebook))
        counts = (RESTART_GRACE * least).clamp(min=1.0).expand_as(self.counts)
        self.codebook.copy_(torch.where(replaced[..., None], vectors, self.codebook))
        self.counts.copy_(torch.where(replaced, counts, self.counts))
        self.sums.copy_(torch.where(replaced[..., None], vectors * counts[..., None], self.sums))

    @torch.no_grad()
    def init_from_data(self, x: Tensor, generator: torch.Generator) -> None:
        """Begin the tables from vectors `[..., C]`, depth by depth: entries drawn in proportion to their squared
        distance from the mean, then a few rounds of Lloyd's algorithm. Each depth of a shared table fills its share.
        """
        vectors = x.float().reshape(-1, x.shape[-1])
        entries, depths = self.config.entries, self.config.depth
        shared = self.config.codebook == "shared"
        filled = 0
        for depth in range(depths):
            share = entries * (depth + 1) // depths - filled if shared else entries
            weight = (vectors - vectors.mean(0)).square().sum(1)
            drawn = torch.rand(len(vectors), generator=generator, device=vectors.device)
            order = (drawn.clamp(min=1e-12).log() / weight.clamp(min=1e-20)).argsort(descending=True)
            table = vectors[order[torch.arange(share, device=order.device) % len(order)]].clone()
            counts = torch.zeros(share, device=vectors.device)
            for _ in range(INIT_ROUNDS):
                codes = nearest(vectors, table)
                counts = torch.bincount(codes, minlength=share).float()
                sums = torch.zeros_like(table).index_add_(0, codes, vectors)
                table = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], table)
            first = filled if shared else 0
            place = self.codebook[0 if shared else depth], self.counts[0 if shared else depth]
            place[0][first : first + share] = table
            place[1][first : first + share] = counts.clamp(min=1.0)
            filled += share
            reach = place[0][: filled if shared else entries]
            vectors = vectors - reach[nearest(vectors, reach)]
        self.counts.div_(self.counts.mean(1, keepdim=True))  # light, so that they soon follow the first steps
        self.sums.copy_(self.codebook * self.counts[..., None])
