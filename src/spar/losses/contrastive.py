"""SigLIP's pairwise sigmoid loss (arXiv 2303.15343, equation 1): every image with every text of a batch.

L = -1/B sum_i sum_j log sigmoid(y_ij (t cos(x_i, z_j) + b))      y = 1 where j is i's text, else -1
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_contrastive_loss(
    images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, matches: Tensor | None = None
) -> Tensor:
    """The loss of features `[B, W]` each; a float32 scalar.

    Args:
        log_scale: the logarithm of t, a scalar.
        bias: b, a scalar.
        matches: `[B, B]`, which texts are true of which images; by default each image's own alone.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            f"expected features [B, W] of as many texts as images, got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    images, texts = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
    logits = images @ texts.T * log_scale.float().exp() + bias.float()
    matches = torch.eye(len(images), dtype=torch.bool, device=images.device) if matches is None else matches
    return -F.logsigmoid(torch.where(matches, logits, -logits)).sum() / len(images)
