"""A dense change of a layer as LoRA or LoKr factors: the nearest there are, and how far off they are.

LoRA: the truncated singular value decomposition (Eckart and Young 1936). LoKr: the nearest Kronecker product is the leading
singular pair of the matrix whose rows are the blocks (Van Loan and Pitsianis 1993); its W2 then has the rank asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whitetuner.adapters.shapes import AdapterSettings, factorization, tensor_shapes

#: Up to this many rows or columns the exact decomposition is quick; above, the randomised one (Halko et al. 2011).
_EXACT = 1536
_OVERSAMPLED = 16


def factors_of(delta: Tensor, settings: AdapterSettings) -> dict[str, Tensor]:
    """Tensors of the adapter nearest to `delta` (out, in), float32, scale 1; names and shapes as `tensor_shapes`."""
    precise = delta.float()
    if settings.kind == "lora":
        up, down = split(precise, settings.rank)
        return {"lora_A": down, "lora_B": up}
    out, into = precise.shape
    (a, c), (b, d) = factorization(out, settings.factor), factorization(into, settings.factor)
    left, right = _nearest_kronecker(precise, a, b, c, d)
    shapes = tensor_shapes(settings, out, into)
    found: dict[str, Tensor] = {}
    for whole, name in ((left, "lokr_w1"), (right, "lokr_w2")):
        if name in shapes:
            found[name] = whole.contiguous()
        else:
            found[f"{name}_a"], found[f"{name}_b"] = split(whole, settings.rank)
    return found


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (rank, columns) whose product is the nearest of that rank; the size is shared between the two.

    A rank beyond the matrix's own is filled up with zeros, so that all layers of an adapter have one rank.
    """
    rows, columns = matrix.shape
    kept = min(rank, rows, columns)
    if min(rows, columns) <= _EXACT:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        u, s, v = u[:, :kept], s[:kept], v[:kept]
    else:
        state = torch.random.get_rng_state()
        torch.manual_seed(0)  # the same file every time; the generator is given back as it was
        u, s, v = torch.svd_lowrank(matrix, q=min(kept + _OVERSAMPLED, rows, columns), niter=6)
        torch.random.set_rng_state(state)
        u, s, v = u[:, :kept], s[:kept], v[:, :kept].T
    root = s.sqrt()
    up, down = matrix.new_zeros(rows, rank), matrix.new_zeros(rank, columns)
    up[:, :kept], down[:kept] = u * root, root[:, None] * v
    return up, down


def _nearest_kronecker(delta: Tensor, a: int, b: int, c: int, d: int) -> tuple[Tensor, Tensor]:
    """(a, b) and (c, d), the leading singular pair of the (a b, c d) matrix of blocks.

    a b is small (W1's entries): the pair is found in the (a b, a b) Gram matrix, in float64.
    """
    blocks = delta.reshape(a, c, b, d).permute(0, 2, 1, 3).reshape(a * b, c * d)
    if a * b <= c * d:
        gram = (blocks @ blocks.T).double()
        left = torch.linalg.eigh(gram).eigenvectors[:, -1].to(delta.dtype)
        right = left @ blocks
    else:
        gram = (blocks.T @ blocks).double()
        right = torch.linalg.eigh(gram).eigenvectors[:, -1].to(delta.dtype)
        left = blocks @ right
        right = right * left.norm()
        left = left / left.norm().clamp_min(torch.finfo(delta.dtype).tiny)
    size = right.norm().sqrt()  # shared, so that neither factor is at the edge of bf16
    if float(size) == 0.0:
        return left.reshape(a, b), right.reshape(c, d)
    return (left * size).reshape(a, b), (right / size).reshape(c, d)
