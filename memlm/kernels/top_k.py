"""The k largest of each row, sorted: the search that product keys run twice for every head and token."""

import numpy as np
import torch
from torch import Tensor

# Elements of one packed chunk: 256 KB of int64, inside a core's second-level cache.
_CHUNK_ELEMENTS = 32_768
_SHORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
@torch.compiler.disable
def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, in descending order, and where they stand.

    On the CPU, rows of fp32 or shorter floats are packed into integers, the score's bits above and the
    index below, and partitioned by numpy's vectorised selection, several times faster than ``torch.topk``,
    which moves (value, index) pairs one at a time. It breaks ties by the lower index; ``torch.topk``, used
    for all else, leaves them open.

    Args:
        scores: ``[..., K]`` floating point, without NaN.
        k: At most ``K``.

    Returns:
        values: ``[..., k]`` in the dtype of ``scores``.
        indices: ``[..., k]`` int64.
    """
    if scores.device.type != "cpu" or scores.dtype not in _SHORT_DTYPES or scores.numel() == 0:
        values, indices = scores.topk(k, dim=-1)
        return values, indices
    columns = scores.shape[-1]
    rows = scores.reshape(-1, columns)
    indices = torch.empty(rows.shape[0], k, dtype=torch.int64)
    # Counted from the end, so that of equal scores the lower index has the larger key.
    position = torch.arange(columns - 1, -1, -1)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows.shape[0], step):
        bits = rows[start : start + step].float().view(torch.int32)
        # Flipping the lower 31 bits of negative floats makes their order that of signed integers.
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = ((ordered.to(torch.int64) << 32) | position).numpy()
        packed.partition(columns - k, axis=-1)
        best = np.sort(packed[:, columns - k :], axis=-1)[:, ::-1]
        indices[start : start + step] = torch.from_numpy(columns - 1 - (best & 0xFFFFFFFF))
    indices = indices.view(*scores.shape[:-1], k)
    return scores.gather(-1, indices), indices
