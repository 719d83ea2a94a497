"""Mirrors an `nn.Module` of the code under test in the tests' process, parameters and all.

The tests read and write parameters, `state_dict`, `train`, `to` and `grad` of the mirror as of any module; before a
call what they changed goes over, afterwards what the call changed comes back.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from shared.apart.wire import Decoder, Encoder

_Tree = dict[str, Any]
_PLAIN = (type(None), bool, int, float, str, tuple)


def tree(module: nn.Module, encoder: Encoder, handle: Callable[[Any], Any]) -> _Tree:
    """Describe `module` and everything in it; `handle` encodes a module of the code under test."""
    cls = type(module)
    torch_class = cls if cls.__module__.startswith("torch.nn.") else None
    own = vars(module)
    persistent = own.get("_non_persistent_buffers_set", set())
    return {
        "class": encoder(torch_class) if torch_class is not None else None,
        "handle": None if torch_class is not None else handle(module),
        "parameters": {n: encoder(p) for n, p in module._parameters.items()},
        "buffers": {n: [encoder(b), n not in persistent] for n, b in module._buffers.items()},
        "children": {
            n: tree(m, encoder, handle) if m is not None else None for n, m in module._modules.items()
        },
        "values": {n: encoder(v) for n, v in own.items() if n[0] != "_" and n != "training" and _is_plain(v)},
        "training": module.training,
    }


def fill(
    module: nn.Module, encoded: _Tree, decoder: Decoder, child_of: Callable[[_Tree, Decoder], nn.Module]
) -> None:
    """Give `module`, whose `nn.Module.__init__` has run, what `tree` encoded.

    Args:
        module: the module.
        encoded: of it.
        decoder: of the message.
        child_of: returns a module of the code under test, which has a handle.
    """
    # Not by register_parameter: it would ask the module for the name first, and a mirror asks the other process.
    module._parameters.update({n: decoder(p) for n, p in encoded["parameters"].items()})
    for name, (buffer, persistent) in encoded["buffers"].items():
        module._buffers[name] = decoder(buffer)
        if not persistent:
            module._non_persistent_buffers_set.add(name)
    for name, child in encoded["children"].items():
        module._modules[name] = None if child is None else build(child, decoder, child_of)
    module.__dict__.update({n: decoder(v) for n, v in encoded["values"].items() if n[:1] != "_"})
    module.training = bool(encoded["training"])


def build(encoded: _Tree, decoder: Decoder, child_of: Callable[[_Tree, Decoder], nn.Module]) -> nn.Module:
    """Return a module of torch with the parameters that `tree` encoded; see `fill`."""
    if encoded["handle"] is not None:
        return child_of(encoded, decoder)
    cls = decoder(encoded["class"])
    if not issubclass(cls, nn.Module):
        raise ValueError(f"{cls} is no module")
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    fill(module, encoded, decoder, child_of)
    return module


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN and (type(value) is not tuple or all(_is_plain(v) for v in value))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer once, by its name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that want gradients, in order."""
    return [p for p in module.parameters() if p.requires_grad]


def versions(module: nn.Module) -> dict[str, Any]:
    """Return what tells later which tensors of `module` were changed."""
    return {name: (id(t), t._version, t.data_ptr(), t.dtype) for name, t in named_tensors(module)}


def state(module: nn.Module, seen: dict[str, Any], encoder: Encoder) -> _Tree:
    """Encode what changed since `seen`, and every flag."""
    now = versions(module)
    return {
        "tensors": {
            name: encoder(t.detach()) for name, t in named_tensors(module) if seen.get(name) != now[name]
        },
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "training": {name: m.training for name, m in module.named_modules()},
    }


def load_state(module: nn.Module, encoded: _Tree, decoder: Decoder) -> None:
    """Take over what `state` encoded on the other side."""
    now = dict(named_tensors(module))
    with torch.no_grad():
        for name, tensor in encoded["tensors"].items():
            new = decoder(tensor)
            old = now[name]
            if old.dtype == new.dtype and old.shape == new.shape:
                old.copy_(new)
            else:
                old.data = new
    for name, wants in encoded["requires_grad"].items():
        parameter = now[name]
        if parameter.requires_grad is not wants:
            parameter.requires_grad_(wants)
    inside = dict(module.named_modules())
    for name, training in encoded["training"].items():
        inside[name].training = bool(training)


def changed_state(module: nn.Module, seen: dict[str, Any], encoder: Encoder) -> _Tree:
    """Encode what a call changed."""
    return state(module, seen, encoder)
