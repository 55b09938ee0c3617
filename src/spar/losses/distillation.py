"""The tokenizer's two distillation terms (SPAR section 1).

    L_s = || f_v - f'_v ||^2      stage III: the semantic features stay close to a frozen copy of the encoder's
    L_p = || z_p - E_p(I) ||^2    stage I: the pixel stream learns the decoder's native latents

Both are means over every element. The teacher's side gets no gradient.
"""

import torch.nn.functional as F
from torch import Tensor

from spar.common.checks import check_pair


def feature_mse(student: Tensor | None, teacher: Tensor | None, *, names: tuple[str, str]) -> Tensor:
    """Mean squared error of student against a detached teacher of the same shape; a float32 scalar.

    names: names of the two in the ValueError for a missing or mismatched tensor.
    """
    student, teacher = check_pair(names[0], student, names[1], teacher)
    return (student.float() - teacher.detach().float()).square().mean()


def cosine_distance(student: Tensor | None, teacher: Tensor | None) -> Tensor:
    """One less the cosine of student and detached teacher over the last axis, its mean; a float32 scalar."""
    student, teacher = check_pair("student", student, "teacher", teacher)
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def semantic_loss(f_v: Tensor | None, teacher: Tensor | None) -> Tensor:
    """L_s for f_v and the frozen encoder's f'_v, both [B, N, D_s]."""
    return feature_mse(f_v, teacher, names=("f_v", "the frozen encoder's f_v"))


def native_latent_loss(z_p: Tensor | None, native: Tensor | None) -> Tensor:
    """L_p for z_p and the frozen autoencoder's own latents of the same image, in the same layout and grid."""
    return feature_mse(z_p, native, names=("z_p", "the autoencoder's latents"))
