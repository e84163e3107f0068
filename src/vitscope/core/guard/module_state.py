"""Plain attributes of a model's modules: undo what a forward pass writes there, empty tables made from weights, give all back.

Some networks keep tensors that they computed from their weights on plain attributes, which are neither parameters nor
buffers: timm's LeViT, EfficientFormer, EfficientViT-M and TinyViT fill a dictionary of attention biases at the first pass in
eval mode. Such a table stays what it was when the weights change. Nothing here knows these classes by name: any attribute
that a forward pass writes is undone after the pass, so that every pass computes its tables from the weights it has.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs
from vitscope.core.guard.fingerprints import same_bits, version
from vitscope.core.guard.pass_hooks import hooked_passes
from vitscope.runtime.torch_internals import MODULE_ATTRIBUTES, MODULE_REGISTRIES

#: attributes that every module has; hooks, parameters, buffers and submodules are looked after one by one
_OWN, _TENSORS = MODULE_ATTRIBUTES, MODULE_REGISTRIES
_HOOKS = tuple(sorted(name for name in MODULE_ATTRIBUTES if "hook" in name))
#: containers of more entries are data, not tables of a network
_MOST_ENTRIES = 1000
_DEPTH = 4
_OPAQUE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, Tensor)

#: place of a table: the module's class and the attribute
Place = tuple[type, str]
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "builtins", "functools")


class AttributeSnapshot:
    """The plain attributes of a model's modules, and the containers and objects they hold, as they were.

    Hooks that are registered later are removed with the attributes that may tell of them: modules of transformers install hooks
    in their first pass, and a flag.

    Args:
        model: The model with the modules to look at, and those that they hold in plain lists and dictionaries.
        hooks: Whether to also put back hooks that were removed, and the attributes that every module has, such as ``training``.
        values: Whether to also keep copies of tensors on plain attributes, to undo changes in place.
    """

    def __init__(self, model: nn.Module, *, hooks: bool = False, values: bool = False) -> None:
        self._dicts: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._registered: list[tuple[nn.Module, tuple[dict[str, Any], ...]]] = []
        self._hook_keys: list[tuple[MutableMapping[int, Any], frozenset[int]]] = []
        self._seen: set[int] = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._hooks, self._values = hooks, values
        self._pending = list(model.modules())
        while self._pending:
            self._add_module(self._pending.pop())

    def restore(self) -> None:
        """Put every attribute back: the same objects, with the entries and values that they had."""
        for module, registered in self._registered:
            for name, before in zip(_TENSORS, registered):
                # a module in training mode replaces its statistics on purpose
                _restore_registered(vars(module)[name], before, rebind=self._hooks or not module.training)
        for entries, before in self._dicts:
            _restore_mapping(entries, before)
        for entries, keys in self._hook_keys:
            for key in [key for key in entries if key not in keys]:
                del entries[key]
        for entries, before in self._lists:
            if len(entries) != len(before) or any(a is not b for a, b in zip(entries, before)):
                entries[:] = before
        for entries, before in self._sets:
            if entries != before:
                entries.clear()
                entries.update(before)
        for tensor, count, copy in self._tensors:
            if copy is not None and (version(tensor) != count or not same_bits(tensor, copy)):
                with torch.no_grad():
                    tensor.copy_(copy)

    def _add_module(self, module: nn.Module) -> None:
        if id(module) in self._seen or isinstance(module, torch.jit.ScriptModule):  # whose state is not Python's
            return
        self._seen.add(id(module))
        attributes = vars(module)
        self._registered.append((module, tuple(dict(attributes[name]) for name in _TENSORS)))
        hooks = [value for name in _HOOKS if isinstance(value := attributes.get(name), dict)]
        self._hook_keys.extend((entries, frozenset(entries)) for entries in hooks)
        skipped = frozenset(_TENSORS) if self._hooks else _OWN
        plain = {key: value for key, value in attributes.items() if key not in skipped}
        self._dicts.append((_Plain(attributes, skipped), plain))
        for key, value in plain.items():
            if key not in _OWN:
                self._add(value, 1)
            elif isinstance(value, dict):
                self._dicts.append((value, dict(value)))

    def _add(self, value: Any, depth: int) -> None:
        """Keep what a value holds: of containers and objects their entries, down to a depth."""
        if isinstance(value, str | int | float | bool | None) or id(value) in self._seen or depth > _DEPTH:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self._tensors.append((value, version(value), value.detach().clone() if self._values else None))
        elif isinstance(value, nn.Module):
            self._pending.extend(value.modules())
        elif isinstance(value, dict | list | set | tuple):
            self._add_container(value, depth)
        else:
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        """Keep the attributes of an object, and the tables on them: not all objects that it knows."""
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or _is_opaque(value):
            return
        self._seen.add(id(value))
        self._dicts.append((attributes, dict(attributes)))
        if len(attributes) <= _MOST_ENTRIES:
            for entry in list(attributes.values()):
                if isinstance(entry, Tensor | dict | list | tuple):
                    self._add(entry, _DEPTH - 1)

    def _add_container(self, value: dict[Any, Any] | list[Any] | set[Any] | tuple[Any, ...], depth: int) -> None:
        self._seen.add(id(value))
        if len(value) > _MOST_ENTRIES:
            return
        if isinstance(value, dict):
            self._dicts.append((value, dict(value)))
        elif isinstance(value, list):
            self._lists.append((value, list(value)))
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        for entry in list(value.values()) if isinstance(value, dict) else list(value):
            self._add(entry, depth + 1)


def _is_opaque(value: Any) -> bool:
    """Return whether an object is code, or the framework's own: nothing in which a network would keep tables."""
    return isinstance(value, _OPAQUE) or type(value).__module__.partition(".")[0] in _FRAMEWORKS


class _Plain(MutableMapping[str, Any]):
    """A module's ``__dict__`` without some of its keys."""

    def __init__(self, attributes: dict[str, Any], skipped: frozenset[str]) -> None:
        self.own, self.skipped = attributes, skipped

    def __getitem__(self, key: str) -> Any:
        return self.own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.own[key] = value

    def __delitem__(self, key: str) -> None:
        del self.own[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.own if key not in self.skipped)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _restore_mapping(entries: MutableMapping[Any, Any], before: dict[Any, Any]) -> None:
    for key in [key for key in entries if key not in before]:
        del entries[key]
    for key, value in before.items():
        if key not in entries or entries[key] is not value:
            entries[key] = value


def _restore_registered(entries: dict[str, Any], before: dict[str, Any], rebind: bool) -> None:
    """Take out what was registered since; put buffers back that were replaced (``rebind``) or were None."""
    for key in [key for key in entries if key not in before]:
        del entries[key]
    for key, value in before.items():
        if key not in entries or (entries[key] is not value and (rebind or value is None)):
            entries[key] = value


def method_caches(model: nn.Module) -> list[Callable[[], None]]:
    """Return what empties the ``functools`` caches of methods and properties of the model's own classes."""
    clear_functions: dict[int, Callable[[], None]] = {}
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        for value in vars(kind).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, functools._lru_cache_wrapper):
                clear_functions[id(function)] = function.cache_clear
    return list(clear_functions.values())


@contextmanager
def pure_forward(model: nn.Module) -> Iterator[None]:
    """Make every forward pass inside free of side effects on attributes, and its inputs copies of what it is given.

    Attributes, and buffers and modules that a pass registers, are back after the pass; values that it writes into existing
    buffers stay (statistics that are recomputed on purpose). The images of a caller are not changed in place.
    """
    clear = method_caches(model)
    references = list(parameter_references(model))
    open_passes: list[AttributeSnapshot] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for empty in clear:
            empty()
        open_passes.append(AttributeSnapshot(model))
        for entries, key, owner, name in references:
            parameter = dict(owner.named_parameters(recurse=False, remove_duplicate=False)).get(name)
            if parameter is not None and entries[key] is not parameter:
                entries[key] = parameter
        return tuple(a.clone() if isinstance(a, Tensor | BatchInputs) else a for a in args)

    def after(*_: Any) -> None:
        if open_passes:
            open_passes.pop().restore()

    try:
        with hooked_passes(model, before, after):
            yield
    finally:
        for empty in clear:
            empty()


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Return the keys or places and the entries of a mapping or list that is not too long to look through."""
    if not isinstance(value, dict | list) or len(value) > _MOST_ENTRIES:
        return []
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def parameter_references(model: nn.Module) -> Iterator[tuple[Any, Any, nn.Module, str]]:
    """Yield ``(container, key, module, name)`` of each plain attribute or list entry that is a parameter of the model.

    Such as ``nn.LSTM._flat_weights``. `torch.func.functional_call` puts other tensors in place of the parameters, but not
    there.
    """
    owners = {
        id(p): (m, name)
        for m in model.modules()
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
    }
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in vars(module).items():
            if key in _OWN:
                continue
            for place, entry in _entries(value):
                if id(entry) in owners:
                    yield value, place, *owners[id(entry)]
            if id(value) in owners:
                yield vars(module), key, *owners[id(value)]


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Give plain attributes and hooks back as they were: the same objects with the same contents."""
    snapshot = AttributeSnapshot(model, hooks=True, values=True)
    try:
        yield
    finally:
        snapshot.restore()


def filled_places(model: nn.Module) -> list[Place]:
    """Return where the model's modules keep tensors on plain attributes that are no parameters or buffers."""
    registered = {id(t) for t in (*model.parameters(), *model.buffers())}
    places: dict[Place, None] = {}
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for key, value in vars(module).items():
            # a weight that a hook makes before each pass (weight norm, pruning) is never out of date in a pass
            hooked = any(f"{key}{end}" in parameters for end in ("_orig", "_g"))
            if key not in _OWN and not hooked and any(id(t) not in registered for t in _tensors(value)):
                places[type(module), key] = None
    return list(places)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and len(value) <= _MOST_ENTRIES and depth < _DEPTH:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry, depth + 1)


def empty_place(model: nn.Module, place: Place, way: str) -> None:
    """Empty one place in all its modules: ``clear`` containers, set the attribute to ``none``, or ``delete`` it."""
    kind, key = place
    for module in model.modules():
        if type(module) is not kind or key not in vars(module):
            continue
        value = vars(module)[key]
        if way == "clear" and isinstance(value, dict | list):
            value.clear()
        elif way == "none":
            vars(module)[key] = None
        elif way == "delete":
            del vars(module)[key]


def refilled_places(model: nn.Module, run: Callable[[], Any]) -> dict[Place, str]:
    """Return the places whose tensors a forward pass makes again where they are missing, and the way to empty each.

    Each place is emptied in turn and a pass is run: if the pass fails, the tensors were constants that it reads; if it
    does not fill the place again, it does not use it. The model is as before afterwards.

    Args:
        model: The model inside a guard, without `pure_forward`.
        run: Runs one forward pass.
    """
    ways_by_place: dict[Place, str] = {}
    for place in filled_places(model):
        for way in ("clear", "none", "delete"):
            snapshot = AttributeSnapshot(model)
            try:
                empty_place(model, place, way)
                if place in filled_places(model):
                    continue  # this way does not empty that kind of attribute
                run()
                refilled = place in filled_places(model)
            except Exception:  # whatever a network raises where its constants are missing
                refilled = False
            finally:
                snapshot.restore()
            if refilled:
                ways_by_place[place] = way
                break
    return ways_by_place
