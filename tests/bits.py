"""Numbers as their bits, and outputs with every side of the minimum and every sign."""

import torch
from torch import Tensor


def whole(numbers: Tensor) -> Tensor:
    """The bits, as whole numbers."""
    return numbers.view(torch.int16 if numbers.itemsize == 2 else torch.int32)


def every_side_and_sign(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z and y of 16 numbers, such y too as f should not give: where the sign is not that of the side."""
    outputs = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 0.1, -0.1, torch.inf, torch.nan])
    z, y = torch.cartesian_prod(torch.tensor([-6.0, 6.0]), outputs).T
    return z.to(dtype).contiguous(), y.to(dtype).contiguous()
