"""One torch op per logical op, several backends behind it, and the policy that picks one.

The backend is resolved *before* the torch op is called and passed as its last argument, so that a graph, an
exported program or a profiler trace names the implementation that ran. Nothing here ever replaces a refused
backend by another one in silence.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.library import Library

BACKENDS = ("reference", "cpu", "triton", "cuda")

# The refusal of a backend that an op has no row for.
NO_IMPLEMENTATION = "this op has no such implementation"

# The automatic order per device type. Changing it is a user-visible change: changelog entry and benchmark.
AUTO_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}

_LIBRARY = Library("vidops", "DEF")
OPS: dict[str, Op] = {}

# Public functions made of several ops -> those ops, in the order of their first use. For `explain`.
COMPOSITIONS: dict[Callable[..., Any], tuple[str, ...]] = {}


class BackendError(NotImplementedError):
    """No backend, or not the one asked for, can run this call. The text lists every backend's reason.

    `reason` is that of the backend asked for, None when none was.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


def _checked_backend(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def _forced_from_environment() -> dict[str, str]:
    forced = {}
    prefix = "VIDOPS_BACKEND"
    for variable, value in os.environ.items():
        if variable == prefix and value:
            forced["*"] = _checked_backend(value, variable)
        elif variable.startswith(prefix + "_") and value:
            forced[variable[len(prefix) + 1 :].lower()] = _checked_backend(value, variable)
    return forced


def _fallback_from_environment() -> str:
    value = os.environ.get("VIDOPS_FALLBACK", "error")
    if value not in ("error", "warn", "allow"):
        raise ValueError(f"VIDOPS_FALLBACK: expected error, warn or allow, got {value!r}")
    return value


# A plain dictionary, read by traced code: Dynamo guards on its content, so a change of the forced backend
# recompiles instead of reusing a stale choice. Read from the environment once, at import.
_forced: dict[str, str] = _forced_from_environment()
_fallback: dict[str, str] = {"mode": _fallback_from_environment()}


@contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """Force a backend for every op, or for the one named by `op`, inside the ``with`` block.

    Outranked by an explicit ``backend=`` argument, outranks the environment variables
    ``VIDOPS_BACKEND_<OP>`` and ``VIDOPS_BACKEND``. The setting is process-wide, not per thread.

    >>> import torch, vidops
    >>> with vidops.use_backend("reference"):
    ...     vidops.attention_head_mean(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)).shape
    torch.Size([3, 5])
    """
    _checked_backend(name, "use_backend")
    if op is not None and op not in OPS:
        raise ValueError(f"use_backend: unknown op {op!r}; expected one of {', '.join(sorted(OPS))}")
    saved = dict(_forced)
    # A general setting made by code outranks the environment's per-op settings.
    if op is None:
        _forced.clear()
        _forced["*"] = name
    else:
        _forced[op] = name
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(saved)


@dataclass(frozen=True)
class Impl:
    """One backend of one op: its functions, and the check that either accepts a call or says why not."""

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    refuses: Callable[[Sequence[torch.Tensor]], str | None]


@dataclass(frozen=True)
class Backward:
    """The backward op and how autograd reaches it."""

    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    gradient: Callable[..., Any]


@dataclass
class Op:
    """A logical op: torch registration for all its backends.

    `schema` ends with ``str backend``; implementations receive the arguments before it. An op without
    `backward` refuses calls that need a gradient on every backend.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    impls: tuple[Impl, ...]
    backward: Backward | None = None
    autocast_fp32: bool = True
    rows: dict[str, Impl] = field(init=False)
    call: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {impl.backend: impl for impl in self.impls}
        rows = self.rows

        def forward(*args: Any) -> Any:
            return rows[args[-1]].forward(*args[:-1])

        self._define(self.name, self.schema, self.fake, _without_autocast(forward))
        if self.backward is not None:
            name = self.name + "_backward"

            def backward(*args: Any) -> Any:
                return rows[args[-1]].backward(*args[:-1])  # type: ignore[misc]

            self._define(name, self.backward.schema, self.backward.fake, _without_autocast(backward))
            torch.library.register_autograd(
                f"vidops::{self.name}",
                self.backward.gradient,
                setup_context=self.backward.setup_context,
                lib=_LIBRARY,
            )
            _refuse_autograd(name, f"vidops.{self.name} has no double backward")
        else:
            # Without this, a backward through the raw torch op would only warn and leave gradients out.
            _refuse_autograd(self.name, f"vidops.{self.name} is not differentiable")
        if self.autocast_fp32:
            for device in ("cpu", "cuda"):
                torch.library.register_autocast(f"vidops::{self.name}", device, torch.float32, lib=_LIBRARY)
        self.call = getattr(torch.ops.vidops, self.name).default
        OPS[self.name] = self

    @staticmethod
    def _define(name: str, schema: str, fake: Callable[..., Any], kernel: Callable[..., Any]) -> None:
        _LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        torch.library.register_fake(f"vidops::{name}", fake, lib=_LIBRARY)

    def refusal(self, backend: str, tensors: Sequence[torch.Tensor], needs_grad: bool) -> str | None:
        """Why `backend` cannot run this call, or None when it can."""
        impl = self.rows.get(backend)
        if impl is None:
            return NO_IMPLEMENTATION
        if needs_grad and (self.backward is None or impl.backward is None):
            if self.backward is None:
                return "the op is not differentiable: detach its inputs or call it under torch.no_grad()"
            return "no backward on this backend, and a gradient is needed"
        return impl.refuses(tensors)

    def choose(self, backend: str | None, tensors: Sequence[torch.Tensor], needs_grad: bool = False) -> str:
        """The backend that runs this call; raises BackendError, listing all reasons, when none may."""
        forced = backend or _forced.get(self.name) or _forced.get("*")
        if forced is not None:
            if backend is not None:
                _checked_backend(backend, f"vidops.{self.name}")
            reason = self.refusal(forced, tensors, needs_grad)
            if reason is None:
                return forced
            raise BackendError(self._refused(tensors, needs_grad, forced), reason)
        for name in AUTO_ORDER.get(tensors[0].device.type, ()):
            if self.refusal(name, tensors, needs_grad) is None:
                return name
        mode = _fallback["mode"]
        if mode != "error" and self.refusal("reference", tensors, needs_grad) is None:
            if mode == "warn":
                _warn_once(self.name, self._refused(tensors, needs_grad, None))
            return "reference"
        raise BackendError(self._refused(tensors, needs_grad, None))

    def plan(self, backend: str | None, tensors: Sequence[torch.Tensor], needs_grad: bool) -> Explanation:
        reasons = {name: self.refusal(name, tensors, needs_grad) for name in BACKENDS}
        try:
            chosen: str | None = self.choose(backend, tensors, needs_grad)
        except BackendError:
            chosen = None
        return Explanation(self.name, chosen, {name: why for name, why in reasons.items() if why})

    def _refused(self, tensors: Sequence[torch.Tensor], needs_grad: bool, forced: str | None) -> str:
        described = ", ".join(f"{tuple(t.shape)} {t.dtype} {t.device}" for t in tensors)
        what = f"backend {forced!r} cannot run this call" if forced else "no backend can run this call"
        lines = [f"vidops.{self.name}: {what}", f"  {described}{', gradient needed' if needs_grad else ''}"]
        for name in BACKENDS:
            reason = self.refusal(name, tensors, needs_grad)
            lines.append(f"  {name}: {reason or 'ready'}")
        if self.refusal("reference", tensors, needs_grad) is None and forced != "reference":
            lines.append('  (pass backend="reference" to run the plain PyTorch form)')
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What would run for one call: `backend` is None when nothing can; `refusals` maps backend to reason.

    Of a composition, `parts` explains each of its ops; `backend` then joins their backends by ``+`` (one name
    when all agree, None when an op cannot run) and `refusals` gives the first op that a backend refuses.
    """

    op: str
    backend: str | None
    refusals: dict[str, str]
    parts: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'nothing can run this call'}"]
        if self.parts:
            lines += ["  " + line for part in self.parts for line in str(part).splitlines()]
        else:
            lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def _composed(name: str, parts: tuple[Explanation, ...]) -> Explanation:
    chosen = dict.fromkeys(part.backend for part in parts)
    refusals: dict[str, str] = {}
    for part in parts:
        for backend, reason in part.refusals.items():
            refusals.setdefault(backend, f"{part.op}: {reason}")
    joined = None if None in chosen else "+".join(backend for backend in chosen if backend)
    return Explanation(name, joined, refusals, parts)


class _Explained(Exception):
    """Carries the arguments of the choice out of the public function that `explain` runs up to there."""

    def __init__(self, op: Op, backend: str | None, tensors: Sequence[torch.Tensor], needs_grad: bool) -> None:
        super().__init__(op.name)
        self.op, self.backend, self.tensors, self.needs_grad = op, backend, tensors, needs_grad


_explaining: dict[str, bool] = {"on": False}


def resolve(op: Op, backend: str | None, *tensors: torch.Tensor, grad: bool = True) -> str:
    """Used by the hubs: choose a backend for `op`; with `grad`, account for inputs that require a gradient."""
    needs_grad = grad and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if _explaining["on"]:
        raise _Explained(op, backend, tensors, needs_grad)
    return op.choose(backend, tensors, needs_grad)


def explain(function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What would run for this very call, and why the other backends would not. Nothing is computed.

    `function` is a public op or its name. Of a composition every op is explained, in the order of their first
    use, for tensors of the device and dtype that the first of them receives.

    >>> import torch, vidops
    >>> vidops.explain("greedy_absorb", torch.ones(1, 1, dtype=torch.int64), backend="reference").backend
    'reference'
    >>> frames = torch.zeros(2, 1, 4, 8)
    >>> [part.op for part in vidops.explain("hierarchical_cluster", frames, frames).parts][:3]
    ['attention_head_mean', 'symmetric_kl_adjacency', 'neighbour_mean']
    """
    import vidops

    call = getattr(vidops, function, None) if isinstance(function, str) else function
    if not callable(call):
        raise ValueError(f"explain: {function!r} is not a vidops function")
    _explaining["on"] = True
    try:
        call(*args, **kwargs)
    except _Explained as found:
        asked = (found.backend, found.tensors, found.needs_grad)
        if call not in COMPOSITIONS:
            return found.op.plan(*asked)
        return _composed(call.__name__, tuple(OPS[name].plan(*asked) for name in COMPOSITIONS[call]))
    finally:
        _explaining["on"] = False
    raise ValueError(f"explain: {function!r} runs no vidops op for this call (the work is plain PyTorch)")


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Inside an implementation PyTorch computes in the dtypes it is given. The first argument is always a tensor."""

    def run(*args: Any) -> Any:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


def _refuse_autograd(name: str, message: str) -> None:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def gradient(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(message)

    torch.library.register_autograd(f"vidops::{name}", gradient, setup_context=setup_context, lib=_LIBRARY)


_warned: set[tuple[str, str]] = set()


def _warn_once(op: str, text: str) -> None:
    if (op, text) not in _warned:
        _warned.add((op, text))
        warnings.warn(f"{text}\n  running the reference (VIDOPS_FALLBACK=warn)", RuntimeWarning, stacklevel=4)


if _fallback["mode"] == "warn":
    # Traced code may not warn without breaking the graph; a constant result is evaluated once, at trace time.
    # Marking it imports Dynamo, seconds that only those who asked for the warning should pay.
    _warn_once = torch.compiler.assume_constant_result(_warn_once)
