"""Running one golden case of a model in each dtype, and comparing all that it names: results, then gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from vidops.validation.case import (
    STORED_FLOAT32,
    Case,
    Check,
    device_of,
    dtypes,
    gradient_checks,
    mismatches,
    nonempty,
    relative_error,
    tag_of,
)

Tensors = dict[str, torch.Tensor]
# Results by the name after "out.", leaves by the name after "grad.", and the differentiated scalar.
Outcome = tuple[Tensors, Tensors, torch.Tensor | None]
Run = Callable[[Case, str, torch.dtype], Outcome]


def checked(
    case: Case,
    backend: str,
    run: Run,
    value_limit: Callable[[str, torch.dtype], float],
    gradient_limits: Mapping[torch.dtype, float],
    *,
    cuda_doubles: bool = False,
) -> list[Check]:
    """Comparisons of what `run` gives on `backend` with what the case holds; integers must be equal.

    `cuda_doubles`: all that `run` calls takes float64 on CUDA too.
    """
    checks: list[Check] = []
    for dtype in dtypes(backend, cuda_doubles=cuda_doubles):
        tag = tag_of(dtype)
        results, leaves, scalar = run(case, backend, dtype)
        for name, value in results.items():
            expected = case.arrays.get(f"out.{name}")
            if expected is None:
                continue
            if expected.dtype.kind in "iu":
                checks.append(Check(f"{name} {tag}", mismatches(value.cpu().numpy(), expected), 0.0))
                continue
            limit = value_limit(name, dtype)
            if expected.dtype == np.float32:
                limit = max(limit, STORED_FLOAT32)
            checks.append(Check(f"{name} {tag}", relative_error(value, torch.from_numpy(expected)), limit))
        if scalar is not None:
            wanted = {f"grad.{name}": tensor for name, tensor in leaves.items()}
            checks += gradient_checks(case, scalar, wanted, gradient_limits[dtype], tag)
    return nonempty(checks)


def given(case: Case, backend: str, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The input of that name, where `backend` takes its tensors."""
    return case.tensor(f"in.{name}", dtype).to(device_of(backend))


def leaf(case: Case, backend: str, name: str, dtype: torch.dtype) -> torch.Tensor:
    return given(case, backend, name, dtype).requires_grad_(True)


def loaded(module: torch.nn.Module, state: Tensors, backend: str, dtype: torch.dtype) -> Tensors:
    """Loads the whole state dict into `module` and returns its parameters."""
    module.to(device=device_of(backend), dtype=dtype).load_state_dict(state, strict=True)
    return dict(module.eval().named_parameters())
