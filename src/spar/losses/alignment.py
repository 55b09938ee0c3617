"""Self-alignment (SPAR section 2, point 6): L_align = -mean_i cos(phi(f_dit,i), f'_v,i).

`projected` is phi(f_dit), an early DiT block's features after the alignment head; `teacher` is f'_v of the target image
from the tokenizer's own encoder (or any other image encoder), and gets no gradient.

Optional departure: features of one encoder share a large mean, so that a constant prediction already has a high plain
cosine. The centred form compares the prediction with the teacher minus that mean, and so rewards only differences
between tokens. It uses only the teacher's statistics.
"""

from torch import Tensor
from torch.nn import functional as F

from spar.common.checks import check_pair


def alignment_loss(
    projected: Tensor | None, teacher: Tensor | None, *, teacher_mean: Tensor | None = None
) -> dict[str, Tensor]:
    """Alignment of `projected` with `teacher`, both [B, N, D] on one grid (see `match_grid`).

    teacher_mean: [D]; with it the loss is the centred cosine instead of the paper's plain one.
    Returns float32 scalars: `loss` (minus one of the cosines), `cosine_plain` and, with a mean, `cosine_centered` (both
    detached). Raises ValueError if an input is missing or shapes differ.
    """
    projected, teacher = check_pair("projected", projected, "teacher", teacher)
    if projected.ndim != 3:
        raise ValueError(f"expected features [B, N, D], got {tuple(projected.shape)}")
    projected, teacher = projected.float(), teacher.detach().float()
    plain = F.cosine_similarity(projected, teacher, dim=-1).mean()
    if teacher_mean is None:
        return {"loss": -plain, "cosine_plain": plain.detach()}
    if teacher_mean.shape != teacher.shape[-1:]:
        raise ValueError(f"expected teacher_mean of shape {tuple(teacher.shape[-1:])}, got {tuple(teacher_mean.shape)}")
    centered = F.cosine_similarity(projected, teacher - teacher_mean.detach().float(), dim=-1).mean()
    return {"loss": -centered, "cosine_plain": plain.detach(), "cosine_centered": centered.detach()}


def match_grid(features: Tensor, *, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Features [B, h*w, D] in row-major order on a source grid (h, w), to [B, h'*w', D] on the target grid.

    Bilinear in two dimensions, pixel centres aligned, outer cells extended. Equal grids return the tensor itself. A
    halved grid is the mean over 2x2 cells; a coarser one samples without a prefilter.
    """
    b, n, d = features.shape
    if n != source[0] * source[1]:
        raise ValueError(f"expected {source[0]} x {source[1]} = {source[0] * source[1]} tokens, got {n}")
    if source == target:
        return features
    grid = features.transpose(1, 2).reshape(b, d, *source)
    grid = F.interpolate(grid.float(), size=target, mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(features.dtype)
