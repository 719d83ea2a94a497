"""The side with the code under test: imports it, and does what the tests ask of it.

It knows nothing of the tests but what they pass it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from shared.apart import modules
from shared.apart.gradients import attach, gradients
from shared.apart.wire import CannotCross, Channel, Decoder, Encoder, Ended
from shared.code_under_test import CannotImport, CodeUnderTest, explain
from shared.forbid import Forbidden
from shared.plugin import is_not_written

_Message = dict[str, Any]
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)


class Server:
    """Serves one lab's code until the tests' side closes the connection.

    Args:
        channel: to the tests.
        code: the code under test.
        look: returns what the code did to this process that it must not, a sentence each; asked after each call.
    """

    def __init__(self, channel: Channel, code: CodeUnderTest, look: Callable[[], list[str]]) -> None:
        self._channel = channel
        self._code = code
        self._look = look
        self._objects: dict[int, Any] = {}
        self._handles: dict[int, int] = {}
        self._graphs: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._forbidden: Forbidden | None = None
        self._bans: list[Any] = []
        self._random: torch.Tensor | None = None
        self._calls = 0

    def serve(self) -> None:
        """Answer until the connection ends."""
        with self._code.active():
            while True:
                try:
                    message, tensors = self._channel.receive()
                except Ended:
                    return
                self._answer(message, tensors)

    def found(self, what: str) -> None:
        """Tell the tests' side at once what the code is about to do."""
        self._channel.send({"tampering": what}, [])

    def _answer(self, message: _Message, tensors: list[torch.Tensor]) -> None:
        encoder = Encoder(self._encode_other)
        try:
            for handle in message.get("free", ()):
                self._graphs.pop(handle, None)
            self._set_bans(message.get("forbid", []))
            reply = getattr(self, f"_op_{message['op']}")(message, tensors)
            if isinstance(reply, tuple):
                reply, encoder = reply
        except Ended:
            raise
        except BaseException as error:
            reply, encoder = self._error(error), Encoder(self._encode_other)
        if self._forbidden is not None and self._forbidden.violations:
            reply["violations"] = list(self._forbidden.violations)
        if self._forbidden is None:  # bans change functions and classes themselves
            for what in self._look():
                self.found(what)
        self._channel.send(reply, encoder.tensors)

    # --- what the tests ask for -----------------------------------------------------------------

    def _op_import(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        module = importlib.import_module(message["module"])
        if self._code.modules.get(message["module"]) is not module:
            raise CannotImport(
                "\n".join(self._code.strangers()) or "the module took itself out of sys.modules"
            )
        encoder = Encoder(self._encode_other)
        names = {}
        for name, value in vars(module).items():
            if name.startswith("__") or isinstance(value, ModuleType):
                continue
            try:
                names[name] = encoder(value)
            except CannotCross:
                continue
        return {"ok": names, "strangers": self._code.strangers()}, encoder

    def _op_nothing(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        return {"ok": None}

    def _op_call(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        target = self._objects[message["target"]]
        return self._run(message, tensors, lambda *a, **k: target(*a, **k))

    def _op_method(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        target, name = self._objects[message["target"]], message["name"]
        return self._run(message, tensors, lambda *a, **k: getattr(target, name)(*a, **k))

    def _op_get(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        target, name = self._objects[message["target"]], message["name"]
        return self._run(message, tensors, lambda: getattr(target, name))

    def _op_tree(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        encoder = Encoder(self._encode_other)
        return {"ok": modules.tree(self._objects[message["target"]], encoder, self._encode_other)}, encoder

    def _op_set(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        target, name = self._objects[message["target"]], message["name"]
        return self._run(message, tensors, lambda value: setattr(target, name, value))

    def _op_backward(self, message: _Message, tensors: list[torch.Tensor]) -> Any:
        outputs, inputs = self._graphs[message["graph"]]
        decoder, encoder = Decoder(tensors, self._decode_other), Encoder(self._encode_other)
        given = [decoder(g) for g in message["gradients"]]
        return {"ok": gradients(outputs, inputs, given, encoder)}, encoder

    # --- running the code ---------------------------------------------------------------------------

    def _run(self, message: _Message, tensors: list[torch.Tensor], function: Callable[..., Any]) -> Any:
        decoder = self._decoder(tensors)
        arguments = [decoder(a) for a in message["args"]]
        named = {name: decoder(a) for name, a in message["kwargs"].items()}
        for handle, state in message.get("modules", {}).items():
            modules.load_state(self._objects[int(handle)], state, decoder)
        if (state := message.get("random")) is not None:
            torch.set_rng_state(decoder(state))
        given = len(decoder.mutable)
        before = [_content(value) for value in decoder.mutable]
        versions = {
            handle: modules.versions(self._objects[int(handle)]) for handle in message.get("modules", {})
        }
        random = torch.get_rng_state()
        with torch.set_grad_enabled(message["grad"]):
            if (dtype := message.get("dtype")) is not None:
                torch.set_default_dtype(decoder(dtype))
            result = function(*arguments, **named)
        changed = [i for i in range(given) if not _same(before[i], _content(decoder.mutable[i]))]
        encoder = Encoder(self._encode_other, {id(v): i for i, v in enumerate(decoder.mutable)})
        encoded = encoder(result)
        outputs = list(encoder.outputs)
        # What was changed in place is sent whole; it is known to the other side, so it is encoded afresh.
        plain = Encoder(self._encode_other)
        plain.tensors = encoder.tensors
        mutations = [[i, plain(_detached(decoder.mutable[i]))] for i in changed]
        states = {
            handle: modules.changed_state(self._objects[int(handle)], seen, plain)
            for handle, seen in versions.items()
        }
        reply: _Message = {"ok": encoded, "changed": mutations, "modules": states}
        if outputs:
            self._calls += 1
            inputs = [t for _, t in sorted(decoder.with_grad.items())]
            inputs += [
                parameter
                for handle in message.get("modules", {})
                for parameter in modules.trainable(self._objects[int(handle)])
            ]
            self._graphs[self._calls] = outputs, inputs
            reply["graph"] = self._calls
        if not torch.equal(random, now := torch.get_rng_state()):
            reply["random"] = plain(now)
        return reply, encoder

    def _set_bans(self, bans: list[Any]) -> None:
        if bans == self._bans:
            return
        if self._forbidden is not None:
            self._forbidden.close()
            self._forbidden = None
        self._bans = bans
        if bans:
            self._forbidden = Forbidden(self._code, taken=[tuple(t) for t in bans[0]["taken"]])
            for ban in bans[1:]:
                self._forbidden(*(_target(t) for t in ban["targets"]), why=ban["why"])

    # --- objects and functions, both ways --------------------------------------------------------------

    def _encode_other(self, value: Any) -> _Message | None:
        handle = self._handles.get(id(value))
        if handle is None:
            handle = self._handles[id(value)] = len(self._handles) + 1
            self._objects[handle] = value  # kept, so that its id stays its own
        if isinstance(value, _Callback):
            return {"k": "callback", "id": value.number}
        described: _Message = {"k": "object", "handle": handle}
        if isinstance(value, type):
            described["kind"] = "module class" if issubclass(value, torch.nn.Module) else "class"
            described["name"] = value.__name__
            ours = [b for b in value.__bases__ if b.__module__ in self._code.lab.module_names]
            described["bases"] = [self._encode_other(b) for b in ours]
        elif isinstance(value, torch.nn.Module):
            described["kind"] = "module"
            described["class"] = self._encode_other(type(value))
        elif isinstance(value, BaseException):
            return None
        elif isinstance(value, _FUNCTIONS):
            described["kind"] = "function"
            described["name"] = getattr(value, "__name__", "function")
        else:
            described["kind"] = "object"
            described["class"] = self._encode_other(type(value))
            described["callable"] = callable(value)
        if described["kind"] in ("function", "class", "module class"):
            described["parameters"] = _parameters(value)
            described["methods"] = _methods(value) if isinstance(value, type) else []
            described["doc"] = value.__doc__ if isinstance(value.__doc__, str) else None
        return described

    def _decode_other(self, encoded: _Message) -> Any:
        match encoded["k"]:
            case "object":
                return self._objects[encoded["handle"]]
            case "callback":
                return _Callback(self, encoded["id"])
        raise ValueError(f"{encoded['k']} is no kind of value")

    def _decoder(self, tensors: list[torch.Tensor], known: list[Any] | None = None) -> Decoder:
        def other(encoded: _Message) -> Any:
            if encoded["k"] == "torch module":
                return modules.build(encoded["v"], decoder, lambda tree, _: self._objects[tree["handle"]])
            return self._decode_other(encoded)

        decoder = Decoder(tensors, other, known)
        return decoder

    def call_back(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function that the tests passed."""
        encoder = Encoder(self._encode_other)
        self._channel.send(
            {
                "callback": number,
                "args": [encoder(a) for a in arguments],
                "kwargs": {k: encoder(v) for k, v in named.items()},
                "grad": torch.is_grad_enabled(),
            },
            encoder.tensors,
        )
        while True:
            message, tensors = self._channel.receive()
            if "op" in message:  # the function called us in turn
                self._answer(message, tensors)
                continue
            if "error" in message:
                raise RuntimeError(message["error"])
            decoder = Decoder(tensors, self._decode_other, encoder.mutable)
            result = decoder(message["ok"])
            if (graph := message.get("graph")) is None or not torch.is_grad_enabled():
                return result
            outputs = [t for _, t in sorted(decoder.with_grad.items())]
            attached = attach(lambda given: self._callback_backward(graph, given), outputs, encoder.outputs)
            again = Decoder(tensors, self._decode_other, encoder.mutable)
            again.attached = dict(zip(sorted(decoder.with_grad), attached, strict=True))
            return again(message["ok"])

    def _callback_backward(
        self, graph: int, given: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        encoder = Encoder(self._encode_other)
        self._channel.send(
            {"callback_backward": graph, "gradients": [encoder(g) for g in given]}, encoder.tensors
        )
        message, tensors = self._channel.receive()
        if "error" in message:
            raise RuntimeError(message["error"])
        decoder = Decoder(tensors, self._decode_other)
        return [decoder(g) for g in message["ok"]]

    def _error(self, error: BaseException) -> _Message:
        kind = next(
            (c for c in type(error).__mro__ if c.__module__ == "builtins" and issubclass(c, Exception)), None
        )
        words = _words(error)
        if kind is None:  # pytest.skip, sys.exit and their kind are no answers
            kind, words = (
                RuntimeError,
                f"the code under test ended the test with {type(error).__name__}: {words}",
            )
        if isinstance(error, CannotCross):
            words = f"{words}; `topeka grade --trust strict` cannot grade what returns it"
        return {
            "error": kind.__name__,
            "words": words,
            "explained": words if isinstance(error, CannotImport) else explain(error, self._code.folder),
            "not_written": is_not_written(error, self._code),
            "cannot_import": isinstance(error, CannotImport),
            "inside": self._code.took_part_in(error),
            "arguments": [a for a in error.args if type(a) in (str, int, float, bool)],
        }


class _Callback:
    """A function of the tests, as the code under test sees it."""

    def __init__(self, server: Server, number: int) -> None:
        self.number = number
        self._server = server

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._server.call_back(self.number, arguments, named)


def _target(encoded: Any) -> Any:
    if isinstance(encoded, str):
        return encoded
    value: Any = importlib.import_module(encoded["module"])
    for part in encoded["path"].split("."):
        value = getattr(value, part)
    return value


def _parameters(value: Any) -> list[list[Any]] | None:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    found = []
    for parameter in signature.parameters.values():
        default = parameter.default
        has = default is not inspect.Parameter.empty
        plain = default if type(default) in (type(None), bool, int, float, str) else "..."
        found.append([parameter.name, int(parameter.kind), has, plain])
    return found


def _methods(cls: type) -> list[str]:
    """Names of the methods that the code under test wrote for `cls`."""
    bases = [b for b in cls.__mro__ if b.__module__ == cls.__module__]
    names = {n: v for b in reversed(bases) for n, v in vars(b).items()}
    return [
        n
        for n, v in names.items()
        if isinstance(v, FunctionType) and n not in ("__init__", "__eq__", "__ne__")
    ]


def _content(value: Any) -> Any:
    """What can be compared later to see whether `value` was changed in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list):
        return [id(v) if type(v) not in (int, float, str, bool) else v for v in value]
    if isinstance(value, dict):
        return [(k, id(v) if type(v) not in (int, float, str, bool) else v) for k, v in value.items()]
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return value.get_state()
    return None


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, torch.Tensor):
        if before.shape != now.shape or before.dtype != now.dtype:
            return False
        return bool(((before == now) | ((before != before) & (now != now))).all())
    if isinstance(before, np.ndarray):
        same: bool = before.shape == now.shape and before.dtype == now.dtype
        return same and before.tobytes() == now.tobytes()
    return bool(before == now)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:
        return f"{type(error).__name__}, whose message raises {type(inner).__name__}"
