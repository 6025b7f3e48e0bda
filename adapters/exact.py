"""Where a tensor's float64 is computed: its own device, unless the CPU has to do it."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""

SMALL = 512
"""Side of a matrix up to which the CPU finds eigenvalues sooner than a GPU.

A GPU's solver launches hundreds of kernels one after another, whatever the size.
"""


def exact_device(device: torch.device) -> torch.device:
    """The device that float64 figures of tensors on `device` are computed on."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its own device has none (MPS)."""
    # First moved, then converted: the other way round needs float64 over there.
    return tensor.to(exact_device(tensor.device)).double()


def eigenvalues(matrix: Tensor) -> Tensor:
    """`torch.linalg.eigvalsh` of [..., n, n], where that is fast, put back again."""
    values: Tensor = torch.linalg.eigvalsh(_near(matrix))
    return values.to(matrix.device)


def eigenvectors(matrix: Tensor) -> Tensor:
    """The eigenvectors of `torch.linalg.eigh`, likewise."""
    vectors: Tensor = torch.linalg.eigh(_near(matrix)).eigenvectors
    return vectors.to(matrix.device)


def _near(matrix: Tensor) -> Tensor:
    return matrix.cpu() if matrix.shape[-1] <= SMALL else matrix
