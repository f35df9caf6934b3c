"""A pretended GPU: code that asks for CUDA runs on tensors that have a shape, a type and a device, but no numbers.

torch's FakeTensorMode raises where tensors of two devices meet, and where code asks for the number in a tensor. What
FakeTensorMode leaves to the driver (streams, events, generators, pinned memory, fused optimisers) is replaced here, and
restored when the context ends.

    with fake_cuda() as gpu:
        learner = Learner(…, device=gpu.device)
        with gpu.watch() as watch:
            learner.step(batch, inputs)
    assert watch.launches() <= 100
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda:0")
MEMORY_BYTES = 80 << 30
# They wait for the device: the host needs the answer before it can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
# They start no kernel, although their schema names no alias.
_NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "lift", "detach", "device", "sym_size", "is_pinned"}
_OUR_PACKAGES = ("cache_tools", "train", "pipeline")


class Transfer(NamedTuple):
    """A copy between host and device.

    Attributes:
        phase: what was going on (`Watch.phase`).
        to: `cuda` or `cpu`.
        non_blocking: whether the host goes on before the copy is finished.
        pinned: whether the memory of the host is page-locked, as such a copy needs.
        stream: the CUDA stream that was current.
    """

    phase: str
    to: str
    non_blocking: bool
    pinned: bool
    stream: object

    @property
    def is_safe(self) -> bool:
        """Whether nobody can read the copy too early: it blocks, or it goes from pinned memory to the device."""
        return not self.non_blocking or (self.to == "cuda" and self.pinned)


class Watch(TorchDispatchMode):
    """Counts what a block of code asks of the device.

    Attributes:
        phase: the name under which operations are counted from now on.
        kernels: for each phase, how often each operation was launched on the device.
        transfers: copies between host and device, in order.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self.phase = "step"
        self.kernels: dict[str, Counter[str]] = {}
        self.transfers: list[Transfer] = []

    def launches(self, *phases: str) -> int:
        """Number of kernels of these phases, or of all."""
        return sum(count.total() for phase, count in self.kernels.items() if not phases or phase in phases)

    def clear(self) -> None:
        self.kernels, self.transfers = {}, []

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def phases(self, **functions: tuple[Any, str]) -> contextlib.ExitStack:
        """Count calls of a method under a phase of its own: `phases(forward=(learner, "_forward"))`."""
        stack = contextlib.ExitStack()
        for phase, (owner, name) in functions.items():
            stack.enter_context(mock.patch.object(owner, name, self._counted(phase, getattr(owner, name))))
        return stack

    def _counted(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        by_mask = name.startswith(("index", "_index_put")) and any(tensor.dtype is torch.bool for tensor in given[1:])
        if (name in WAITS or by_mask) and any(tensor.is_cuda for tensor in given):
            raise AssertionError(f"'{name}' in {self.phase}: the host waits for the device")
        result = func(*args, **kwargs)
        made = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, Tensor)]
        if name in {"_to_copy", "copy_"}:
            self._see_copy(given, made, bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False)))
        # A node of the graph copies cuDNN's reserve when it is called outside of torch's engine.
        is_reserve = name == "clone" and given[0].dtype is torch.uint8 and self.phase == "backward"
        if any(tensor.is_cuda for tensor in (*given, *made)) and not _is_view(func, name) and not is_reserve:
            self.launch(name)
        return result

    def launch(self, name: str) -> None:
        self.kernels.setdefault(self.phase, Counter())[name] += 1

    def _see_copy(self, given: list[Tensor], made: list[Tensor], non_blocking: bool) -> None:
        source, target = given[-1], made[0]
        if source.device.type == target.device.type:
            return
        host = source if target.is_cuda else target
        self.transfers.append(
            Transfer(self.phase, target.device.type, non_blocking, self._gpu.is_pinned(host), self._gpu.stream)
        )


def _is_view(func: Any, name: str) -> bool:
    if name in _NO_KERNEL or name.startswith(("empty", "new_empty", "_record_function")):
        return True
    returned = func._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returned)


class _Stream:
    """A stream that keeps the order of the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        FakeGpu.active().streams += 1
        self.device, self.cuda_stream, self.priority = DEVICE, 0, 0

    def wait_stream(self, other: object) -> None:
        FakeGpu.active().waits.append("stream")

    def wait_event(self, event: object) -> None:
        FakeGpu.active().waits.append("event")

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        FakeGpu.active().events.append(kwargs)

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0


@dataclass
class FakeGpu:
    """The pretended GPU inside `fake_cuda`.

    Attributes:
        streams: number of streams that were made.
        events: the settings of each event that was made.
        waits: what streams have waited for, `stream` or `event`, in order.
        recorded: how often memory was marked as used by another stream.
        free_bytes: what `torch.cuda.mem_get_info` gives.
        peak_bytes: the most that torch has reserved, as a test sets it.
    """

    mode: FakeTensorMode
    device: torch.device = DEVICE
    streams: int = 0
    free_bytes: int = MEMORY_BYTES
    reserved_bytes: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.waits: list[str] = []
        self.recorded = 0
        self.watches: list[Watch] = []
        self.stream = self.default_stream = object()

    @classmethod
    def active(cls) -> FakeGpu:
        assert _active, "a stream or an event outside of fake_cuda"
        return _active[-1]

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Count what the code inside asks of the device."""
        watch = Watch(self)
        self.watches.append(watch)
        try:
            with watch:
                yield watch
        finally:
            self.watches.pop()

    @contextlib.contextmanager
    def current(self, stream: object) -> Iterator[None]:
        """Inside, this is the current stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def reset_peak(self, device: object = None) -> None:
        self.peak_bytes = self.reserved_bytes

    def record_stream(self, tensor: Tensor, stream: object) -> None:
        self.recorded += 1

    def pin(self, tensor: Tensor) -> Tensor:
        tensor._is_pinned_here = True  # type: ignore[attr-defined]
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether this tensor, or the one that it is a part of, is in page-locked memory."""
        return any(getattr(each, "_is_pinned_here", False) for each in (tensor, tensor._base))


_active: list[FakeGpu] = []


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGpu]:
    """Inside, `cuda:0` exists, and every tensor is a fake one. Threads of pools run their work at once, in order."""
    gpu = FakeGpu(FakeTensorMode(allow_non_fake_inputs=True))
    multithreaded = torch.autograd.is_multithreading_enabled()
    torch._C._ensureCUDADeviceGuardSet()
    _clear_caches()
    _active.append(gpu)
    try:
        torch.autograd.set_multithreading_enabled(False)  # backward runs in this thread, where it is counted
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            for target, name, value in _replacements(gpu):
                stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(gpu.mode)
            yield gpu
    finally:
        torch.autograd.set_multithreading_enabled(multithreaded)
        _active.pop()
        _clear_caches()


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on real tensors, also inside `fake_cuda`: for what the host itself draws or reads."""

    @functools.wraps(function)
    def on_host(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return on_host


def _replacements(gpu: FakeGpu) -> list[tuple[Any, str, Any]]:
    cuda, generator, empty, zeros = torch.cuda, torch.Generator, torch.empty, torch.zeros
    state = torch.get_rng_state()
    gpu.stream = gpu.default_stream = _Stream()
    gpu.streams = 0

    def pinning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return gpu.pin(tensor) if pin_memory else tensor

        return made

    return [
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "get_device_name", lambda device=None: "a pretended GPU"),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "is_initialized", lambda: False),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "mem_get_info", lambda device=None: (gpu.free_bytes, MEMORY_BYTES)),
        (cuda, "memory_reserved", lambda device=None: gpu.reserved_bytes),
        (cuda, "memory_allocated", lambda device=None: gpu.allocated_bytes),
        (cuda, "max_memory_reserved", lambda device=None: gpu.peak_bytes),
        (cuda, "reset_peak_memory_stats", gpu.reset_peak),
        (cuda, "empty_cache", lambda: None),
        (cuda, "synchronize", lambda device=None: None),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (cuda, "current_stream", lambda device=None: gpu.stream),
        (cuda, "stream", gpu.current),
        (cuda, "get_rng_state", lambda device=None: state),
        (cuda, "set_rng_state", lambda state, device=None: None),
        (torch, "Generator", lambda device="cpu": generator()),
        (torch, "empty", pinning(empty)),
        (torch, "zeros", pinning(zeros)),
        (torch, "empty_like", pinning(torch.empty_like)),
        (torch, "_fused_sgd_", _optimiser_kernel(gpu, "_fused_sgd_")),
        (torch, "_fused_adamw_", _optimiser_kernel(gpu, "_fused_adamw_")),
        (torch.Tensor, "numpy", real(torch.Tensor.numpy)),
        (torch.Tensor, "backward", _backward),
        (torch.Tensor, "pin_memory", lambda tensor, *args: gpu.pin(tensor)),
        (torch.Tensor, "is_pinned", lambda tensor, *args: gpu.is_pinned(tensor)),
        (torch.Tensor, "record_stream", lambda tensor, stream: gpu.record_stream(tensor, stream)),
        (nn.Module, "to", _move_module),
        (torch.Tensor, "__deepcopy__", _deep_copy),
        (nn.Parameter, "__deepcopy__", _deep_copy),
        (ThreadPoolExecutor, "submit", _submit),
        (fake_tensor, "init_gpu_context", lambda *args, **kwargs: None),
        (FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
    ]


def _optimiser_kernel(gpu: FakeGpu, name: str) -> Callable[..., None]:
    def step(parameters: list[Tensor], gradients: list[Tensor], *args: Any, **kwargs: Any) -> None:
        devices = {tensor.device for tensor in (*parameters, *gradients)}
        rate = kwargs.get("lr")
        assert devices == {DEVICE}, f"a fused optimiser of tensors on {devices}"
        assert not isinstance(rate, Tensor) or rate.device == DEVICE, f"a learning rate on {rate.device}"
        for watch in gpu.watches:
            watch.launch(name)

    return step


def _move_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`nn.Module.to`, which cannot change the device of a fake parameter in place."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    moved: dict[int, Any] = {}

    def move(tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() or tensor.is_complex()
        target: dict[str, Any] = {"device": device or tensor.device, "dtype": dtype if dtype and wide else tensor.dtype}
        if memory_format is not None and tensor.ndim == 4:
            target["memory_format"] = memory_format
        return tensor.detach().to(**target)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(move(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved.setdefault(id(buffer), move(buffer))
    return module


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy`, without a look at the memory: torch 2.14 crashes when it has copied that of a fake tensor."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=tensor.requires_grad) if is_parameter else copied
    return memo[id(tensor)]


def _backward(loss: Any, gradient: Tensor | None = None) -> None:
    """`Tensor.backward`, node by node: the engine of torch asks the driver, which is not there."""
    waiting: Counter[Any] = Counter()
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:  # grows while it is read
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    nodes.append(following)
                waiting[following] += 1
    gradients: dict[Any, list[Any]] = {loss.grad_fn: [torch.ones_like(loss) if gradient is None else gradient]}
    ready: list[Any] = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node, None)
            if given is not None and hasattr(node, "variable"):  # its gradient is kept, not copied
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad.add_(given[0])
                given = None
            call = getattr(node, "apply", node)  # of a function in Python, or of torch's own
            results = (None,) * len(node.next_functions) if given is None else call(*given)
            results = results if isinstance(results, tuple) else (results,)
            for (following, place), gradient in zip(node.next_functions, results, strict=False):
                if following is None:
                    continue
                if gradient is not None:
                    slots = gradients.setdefault(following, [None] * len(following._input_metadata))
                    wanted = following._input_metadata[place]
                    if list(gradient.shape) != list(wanted.shape):
                        gradient = gradient.sum_to_size(wanted.shape)
                    assert gradient.device == wanted.device, f"a gradient on {gradient.device} of {following}"
                    gradient = gradient.to(wanted.dtype)
                    slots[place] = gradient if slots[place] is None else slots[place] + gradient
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Do the work at once, because a mode of torch holds for one thread only, but on the stream of a new thread."""
    future: Future[Any] = Future()
    gpu = FakeGpu.active()
    try:
        with gpu.current(gpu.default_stream):
            future.set_result(function(*args, **kwargs))
    except BaseException as error:
        future.set_exception(error)
    return future


def _clear_caches() -> None:
    """Empty the caches of functions of ours, so that no fake tensor stays in them and no real one comes in."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OUR_PACKAGES:
            for value in list(vars(module).values()):
                # Pools of threads are cached too, and stay.
                if callable(getattr(value, "cache_clear", None)) and "_workers" not in getattr(value, "__name__", ""):
                    value.cache_clear()
