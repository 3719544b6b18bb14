"""KDSVD through a full singular value decomposition, image by image, over columns or over channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def naive_directions(image: Tensor, n: int, axis: str = "columns") -> tuple[Tensor, Tensor]:
    """(C, H, W) -> right singular vectors and singular values (n,).

    The vectors are (W, n), of the (C H, W) matrix, or for the axis "channels" (C, n), of the (HW, C) matrix.
    """
    columns, channels = image.shape[2], image.shape[0]
    matrix = image.reshape(-1, columns) if axis == "columns" else image.permute(1, 2, 0).reshape(-1, channels)
    _, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh[:n].T, sigma[:n]


def naive_kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int, axis: str = "columns") -> Tensor:
    total = g_s[0].new_zeros(())
    for b in range(len(g_s[0])):
        before = None
        for f_s, f_t in zip(g_s, g_t):
            v_t, sigma = naive_directions(f_t[b].detach(), k, axis)
            v_t = torch.stack([v if v.sum() >= 0 else -v for v in v_t.T], dim=1)  # our choice of sign
            v_s, _ = naive_directions(f_s[b], k + 3, axis)
            chosen = []
            for v in v_t.T:
                cosines = [float(v_s[:, i].detach() @ v) for i in range(v_s.shape[1])]
                best = max(range(len(cosines)), key=lambda i: abs(cosines[i]))
                chosen.append(v_s[:, best] if cosines[best] > 0 else -v_s[:, best])
            scale = sigma / sigma.norm()
            after = torch.stack(chosen, dim=1) * scale, v_t * scale
            if before is not None:
                change_s, change_t = (
                    torch.exp(-((now[:, None] - then[None, :]) ** 2) / 8) for now, then in zip(after, before)
                )
                total = total + ((change_s - change_t) ** 2).sum()
            before = after
    return total / len(g_s[0])
