"""How calls and values cross between the tests and the code under test.

A message is a frame of three parts: two lengths (4 and 8 bytes, big-endian), JSON, and a safetensors buffer with the
tensors that the JSON refers to by number. Only values of exactly the classes named here cross: a subclass, which could
redefine `==`, becomes a handle or is refused.
"""

import collections
import importlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

_LENGTHS = struct.Struct(">IQ")
_MAX_JSON, _MAX_TENSORS = 256 << 20, 4 << 30
_PLAIN = (type(None), bool, int, float, str)
_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_NUMPY_SCALARS = (np.number, np.bool_)


class CannotCross(TypeError):
    """A value of a kind that does not cross between the processes."""


class Ended(ConnectionError):
    """The other process is gone."""


class Channel:
    """Frames over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        """Send `message` and the tensors it refers to."""
        text = json.dumps(message).encode()
        blob = save({str(i): t for i, t in enumerate(tensors)}) if tensors else b""
        try:
            self._connection.sendall(_LENGTHS.pack(len(text), len(blob)) + text + blob)
        except OSError as error:
            raise Ended("the process of the code under test has ended") from error

    def receive(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Return the next message and its tensors.

        Raises:
            Ended: the other side closed the connection, or sends what is no message.
        """
        text_bytes, blob_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if text_bytes > _MAX_JSON or blob_bytes > _MAX_TENSORS:
            raise Ended("the process of the code under test sent what is no message")
        try:
            message = json.loads(self._read(text_bytes))
            tensors = load(self._read(blob_bytes)) if blob_bytes else {}
            ordered = [tensors[str(i)] for i in range(len(tensors))]
        except Ended:
            raise
        except Exception as error:
            raise Ended("the process of the code under test sent what is no message") from error
        if type(message) is not dict:
            raise Ended("the process of the code under test sent what is no message")
        return message, ordered

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = self._connection.recv(min(count, 1 << 20))
            except OSError as error:
                raise Ended("the process of the code under test has ended") from error
            if not part:
                raise Ended("the process of the code under test has ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class Encoder:
    """Turns the values of one message into JSON and a list of tensors.

    Args:
        other: encodes what is no plain data; None if it cannot.
        known: objects that the other side has already, by identity, and their numbers there.
    """

    def __init__(
        self, other: Callable[[Any], dict[str, Any] | None], known: dict[int, int] | None = None
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self.mutable: list[Any] = []
        self.outputs: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}
        self._known = known or {}
        self._other = other

    def __call__(self, value: Any) -> Any:
        """Return the JSON for `value`.

        Raises:
            CannotCross: it is of a kind that does not cross.
        """
        cls = type(value)
        if any(cls is plain for plain in _PLAIN):
            return value
        if id(value) in self._known:
            return {"k": "known", "m": self._known[id(value)]}
        if id(value) in self._numbers:
            return {"k": "same", "m": self._numbers[id(value)]}
        if cls is torch.Tensor or cls is torch.nn.Parameter:
            self._remember(value)
            return {"k": "tensor", **self._tensor(value), "parameter": cls is torch.nn.Parameter}
        if cls is np.ndarray:
            self._remember(value)
            return self._array(value)
        if cls is list or cls is dict:
            self._remember(value)
            if cls is list:
                return {"k": "list", "v": [self(v) for v in value]}
            return {"k": "dict", "v": [[self(k), self(v)] for k, v in value.items()]}
        if cls is tuple or cls is set or cls is frozenset:
            return {"k": cls.__name__, "v": [self(v) for v in value]}
        if cls is collections.OrderedDict:
            self._remember(value)
            return {"k": "ordered", "v": [[self(k), self(v)] for k, v in value.items()]}
        if cls is torch.Size:
            return {"k": "size", "v": list(value)}
        if cls is bytes:
            return {"k": "bytes", "v": value.hex()}
        if cls is complex:
            return {"k": "complex", "v": [value.real, value.imag]}
        if cls is slice:
            return {"k": "slice", "v": [self(value.start), self(value.stop), self(value.step)]}
        if cls is range:
            return {"k": "range", "v": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"k": "ellipsis"}
        if cls is torch.dtype:
            return {"k": "dtype", "v": str(value).removeprefix("torch.")}
        if cls is torch.device:
            return {"k": "device", "v": str(value)}
        if any(cls is kind for kind in set(np.sctypeDict.values()) if issubclass(kind, _NUMPY_SCALARS)):
            return {**self._array(np.asarray(value)), "k": "number"}
        if cls is np.random.Generator:
            state = value.bit_generator.state
            self._remember(value)
            return {"k": "generator", "class": type(value.bit_generator).__name__, "v": self(dict(state))}
        if cls is torch.Generator:
            self._remember(value)
            return {"k": "torch generator", "v": self(value.get_state()), "device": str(value.device)}
        if isinstance(value, type) and (name := _importable(value)):
            return {"k": "import", "v": name}
        encoded = self._other(value)
        if encoded is None:
            raise CannotCross(
                f"a value of class {cls.__module__}.{cls.__qualname__} cannot cross between processes"
            )
        return encoded

    def _remember(self, value: Any) -> None:
        self._numbers[id(value)] = len(self.mutable)
        self.mutable.append(value)

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            plain = tensor.detach()
            output = None
            if tensor.requires_grad:
                output = len(self.outputs)
                self.outputs.append(tensor)
            complex_as = _COMPLEX.get(plain.dtype)
            content = torch.view_as_real(plain.resolve_conj()) if complex_as else plain.resolve_neg()
            self.tensors.append(content.cpu().contiguous().clone())
            return {
                "i": len(self.tensors) - 1,
                "stride": None if plain.is_contiguous() else list(plain.stride()),
                "complex": bool(complex_as),
                "device": str(plain.device),
                "grad": output,
                "made_by": type(tensor.grad_fn).__name__ if tensor.grad_fn is not None else None,
            }

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        if array.dtype.kind not in "biufc" or array.dtype.byteorder == ">":
            raise CannotCross(f"an array of {array.dtype} cannot cross between processes")
        content = np.array(array, order="C")
        if array.dtype.kind == "c":
            content = content.view(array.real.dtype).reshape(*array.shape, 2)
        self.tensors.append(torch.from_numpy(content))
        strides = None if array.flags.c_contiguous else [abs(s) // array.itemsize for s in array.strides]
        return {
            "k": "array",
            "i": len(self.tensors) - 1,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "stride": strides,
            "readonly": not array.flags.writeable,
        }


class Decoder:
    """Turns JSON and tensors back into values.

    Args:
        tensors: of the message.
        other: decodes what `Encoder`'s `other` encoded.
        known: what `known` and `arguments` numbers of the other side mean here.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        other: Callable[[dict[str, Any]], Any],
        known: list[Any] | None = None,
    ) -> None:
        self.mutable: list[Any] = []
        self.with_grad: dict[int, torch.Tensor] = {}
        self.made_by = ""  # name of the first output's grad_fn on the other side
        self.attached: dict[int, torch.Tensor] = {}  # taken in place of those
        self._tensors = tensors
        self._other = other
        self._known = known or []

    def __call__(self, encoded: Any) -> Any:
        """Return the value of `encoded`; anything malformed raises some exception."""
        if type(encoded) is not dict:
            if any(type(encoded) is plain for plain in _PLAIN):
                return encoded
            raise ValueError(f"{encoded!r:.80} is no encoded value")
        value = encoded.get("v")
        match encoded["k"]:
            case "known":
                return self._known[encoded["m"]]
            case "same":
                return self.mutable[encoded["m"]]
            case "tensor" if encoded["grad"] in self.attached:
                self.mutable.append(self.attached[encoded["grad"]])
                return self.mutable[-1]
            case "tensor":
                tensor = self._tensor(encoded)
                if encoded["parameter"]:
                    tensor = torch.nn.Parameter(tensor, requires_grad=encoded["grad"] is not None)
                elif encoded["grad"] is not None:
                    tensor.requires_grad_()
                if encoded["grad"] is not None:
                    self.with_grad[encoded["grad"]] = tensor
                    self.made_by = self.made_by or str(encoded["made_by"] or "")
                self.mutable.append(tensor)
                return tensor
            case "array":
                array = self._array(encoded)
                self.mutable.append(array)
                return array
            case "number":
                return self._array(encoded)[()]
            case "list":
                items: list[Any] = []
                self.mutable.append(items)
                items.extend(self(v) for v in value or ())
                return items
            case "dict" | "ordered" as kind:
                table: dict[Any, Any] = {} if kind == "dict" else collections.OrderedDict()
                self.mutable.append(table)
                table.update({self(k): self(v) for k, v in value or ()})
                return table
            case "tuple" | "set" | "frozenset" as kind:
                return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
                    self(v) for v in value or ()
                )
            case "iterator":
                return iter([self(v) for v in value or ()])
            case "size":
                return torch.Size(value or ())
            case "bytes":
                return bytes.fromhex(str(value))
            case "complex":
                return complex(*value)  # type: ignore[misc]
            case "slice":
                return slice(*(self(v) for v in value or ()))
            case "range":
                return range(*value)  # type: ignore[misc]
            case "ellipsis":
                return ...
            case "dtype":
                dtype = getattr(torch, str(value))
                if type(dtype) is not torch.dtype:
                    raise ValueError(f"{value!r} is no dtype")
                return dtype
            case "device":
                return torch.device(str(value))
            case "generator":
                bits = {"PCG64": np.random.PCG64, "MT19937": np.random.MT19937}[encoded["class"]]()
                generator = np.random.Generator(bits)
                self.mutable.append(generator)
                bits.state = self(value)
                return generator
            case "torch generator":
                draws = torch.Generator(device=encoded["device"])
                self.mutable.append(draws)
                draws.set_state(self(value))
                return draws
            case "import":
                return imported(str(value))
        return self._other(encoded)

    def _tensor(self, encoded: dict[str, Any]) -> torch.Tensor:
        content = self._tensors[encoded["i"]]
        if encoded["complex"]:
            content = torch.view_as_complex(content)
        if encoded["stride"] is not None:
            content = _strided(content, encoded["stride"])
        tensor: torch.Tensor = content.to(encoded["device"])
        return tensor

    def _array(self, encoded: dict[str, Any]) -> np.ndarray[Any, Any]:
        content = self._tensors[encoded["i"]]
        if encoded["stride"] is not None and not encoded["dtype"].startswith("complex"):
            content = _strided(content, encoded["stride"])
        array = content.numpy()
        if encoded["dtype"].startswith("complex"):
            array = array.view(encoded["dtype"])
        array = array.reshape(encoded["shape"]) if list(array.shape) != encoded["shape"] else array
        if encoded["readonly"]:
            array.flags.writeable = False
        result: np.ndarray[Any, Any] = array
        return result


def _strided(content: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """Return `content` laid out with `stride`; a stride of 0 is an expanded axis."""
    shape = content.shape
    kept = content[tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)]
    reach = 1 + sum((n - 1) * s for n, s in zip(kept.shape, stride, strict=True))
    if content.numel() == 0 or reach > 64 * max(content.numel(), 1):
        return content
    room = torch.zeros(max(reach, 1), dtype=content.dtype)
    laid = torch.as_strided(room, kept.shape, [s if s else 1 for s in stride])
    laid.copy_(kept)
    return laid.expand(shape)


def _importable(value: Any) -> str | None:
    """Return how to import a class of torch or a built-in exception, or None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        try:
            if imported(f"{module}:{name}") is value:
                return f"{module}:{name}"
        except (ValueError, ImportError, AttributeError):
            return None
    return None


def imported(name: str) -> Any:
    """Return the class that `module:qualified.name` means; of torch, NumPy and the built-ins only.

    Raises:
        ValueError: it means something else.
    """
    module, _, path = name.partition(":")
    if module.partition(".")[0] not in ("torch", "builtins", "numpy", "math"):
        raise ValueError(f"{name} is not imported here")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, type):
        raise ValueError(f"{name} is no class")
    return value
