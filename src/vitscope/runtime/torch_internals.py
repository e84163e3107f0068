"""Private interfaces of torch, which may change with any release: the only module that touches them.

`tests/contracts/test_torch.py` states what each of them has to do. On a new release of torch, run ``make test-newest``.
"""

from __future__ import annotations

import multiprocessing.queues
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

#: base class of all BatchNorm layers; also of those that users derive from it and not from ``nn.BatchNorm2d``
BatchNormBase = _BatchNorm
#: base class of all layers that may keep running statistics: BatchNorm and InstanceNorm
RunningNormBase = _NormBase
#: base class of all convolutions, transposed ones included
ConvolutionBase = _ConvNd

#: base class of operators that take functions, such as those of control flow
HigherOrderOperator = torch._ops.HigherOrderOperator

#: context manager within which no function mode, own or foreign, sees the calls of torch's functions
UnobservedFunctions = torch._C.DisableTorchFunction

#: dictionaries of a module that hold its parameters, buffers and submodules
MODULE_REGISTRIES = ("_parameters", "_buffers", "_modules")
#: attributes that every module has
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

#: names under which wrappers keep the module they wrap: DataParallel and EMA, ``torch.compile``, FSDP, activation checkpointing
WRAPPER_ATTRIBUTES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile(model)`` wraps, with the same weights; any other module itself."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = cast(nn.Module, model._orig_mod)
    return model


def is_compiler_loaded() -> bool:
    """Tell whether ``torch.compile`` can have compiled anything in this process; it imports the compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


def original_function(function: Any) -> Any:
    """Return the function or bound method that ``torch.compile(function)`` wraps; any other object itself.

    The compiler puts one more function of its own around a method that torch defines, such as ``nn.Linear.forward``.
    """
    original = getattr(function, "_torchdynamo_orig_callable", function)
    while getattr(original, "__globals__", {}).get("__name__", "").startswith("torch._dynamo"):
        original = original.__wrapped__
    return original


def has_once_differentiable(outputs: Iterable[Tensor]) -> bool:
    """Tell whether ``once_differentiable`` ends the graph of a tensor.

    Its node raises where a derivative passes through it. A derivative by given tensors skips it without a word, since it leads to
    none of them.
    """
    waiting, visited = [t.grad_fn for t in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        visited.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def foreign_functions(output: Tensor) -> set[type]:
    """Return the classes derived from ``torch.autograd.Function`` in a tensor's graph, without those of torch and vitscope."""
    waiting, visited, classes = [output.grad_fn], set(), set[type]()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and function.__module__.partition(".")[0] not in ("torch", "vitscope"):
            classes.add(function)
        waiting.extend(parent for parent, _ in node.next_functions)
    return classes


def default_store() -> Any:
    """Return the store of the default process group: ``set``, ``get`` and ``check`` of keys that all ranks see."""
    from torch.distributed import distributed_c10d  # is not there in builds without torch.distributed

    return distributed_c10d._get_default_store()


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is a ``DTensor``; its module, which takes a second to import, is not imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole_tensor(tensor: Any) -> Tensor:
    """Return all of a tensor that is sharded over ranks, which all call this together; any other tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def forward_hook_registries(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries of a module's forward hooks: those before the pass, and those after it."""
    return [module._forward_pre_hooks, module._forward_hooks]


def is_fully_shard_hook(hook: Any) -> bool:
    """Tell whether ``fully_shard`` registered a forward hook."""
    owner = getattr(getattr(hook, "__wrapped__", hook), "__self__", getattr(hook, "__self__", None))
    return type(owner).__module__.startswith("torch.distributed.fsdp._fully_shard")


def unsharded_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module had before ``fully_shard`` put its own in front of it; None for any other module."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None or not isinstance(module, sharded):
        return None
    bases = type(module).__bases__
    return bases[1] if len(bases) == 2 and bases[0] is sharded else None


def parameter_registry(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary of a module's own parameters."""
    return module._parameters


def buffer_registry(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of a module's own buffers: an entry set here is a buffer whatever the attribute was before."""
    return module._buffers


def set_last_rates(scheduler: Any, rates: Sequence[float]) -> None:
    """Set the learning rates that ``scheduler.get_last_lr()`` returns and that a checkpoint of the scheduler holds."""
    scheduler._last_lr = list(rates)


def worker_processes(loader: Any) -> list[Any]:
    """Return the worker processes of a ``DataLoader`` whose iterator is open; none without workers."""
    return list(getattr(loader._iterator, "_workers", []))


def shut_workers_down(loader: Any) -> None:
    """End the worker processes of a ``DataLoader`` and let its next pass start new ones."""
    if loader.num_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def replace_unsent_items(replacement: Callable[[Exception, Any], Any]) -> None:
    """Let queues of this process send ``replacement(error, item)`` in place of an item that they cannot send.

    A thread of the queue pickles the items; without this the error goes to stderr, and who waits for the item waits for ever.
    For worker processes: it holds for all queues whose thread starts later.
    """

    def send_replacement(queue: Any, error: Exception, item: Any) -> None:
        queue.put(replacement(error, item))

    queue_class: Any = multiprocessing.queues.Queue
    queue_class._on_queue_feeder_error = send_replacement
