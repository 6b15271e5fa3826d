"""Typed calls of actors: a call names the method itself, so grep, IDE and mypy can follow it.

    Handle       an actor, with its class
    start_actor  makes one
    ask          calls a method; the answer is a `Ref`
    ask_pair     the same for a method whose two results are fetched apart
    Call         a method with its arguments, to be asked of several actors
    Ref          a value in Ray's object store, or one that is to come

An actor answers its calls in order, or all at once if its methods are coroutines. A method marked
with `in_group` is answered beside them, by a thread of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
A = TypeVar("A")
B = TypeVar("B")

_GROUP = "__concurrency_group__"


class Ref(Protocol[R_co]):
    """A value in Ray's object store, or one that is to come (`ray.ObjectRef`); await it."""

    def __await__(self) -> Generator[Any, Any, R_co]: ...

    def hex(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Handle(Generic[T_co]):
    """An actor of class `T_co` in some process of the cluster."""

    actor: Any
    """Ray's own handle, whose methods no type checker knows."""

    def kill(self, *, again: bool = False) -> None:
        """End the process, whatever it is doing.

        Args:
            again: Ray starts it again, where the actor's `max_restarts` says so.
        """
        import ray

        ray.kill(self.actor, no_restart=not again)


def in_group(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a method of an actor: calls of it are answered by a thread of their own.

    Args:
        name: methods of the same name share the thread.
    """

    def mark(method: Callable[P, R]) -> Callable[P, R]:
        setattr(method, _GROUP, name)
        return method

    return mark


def start_actor(
    kind: Callable[P, T], options: Mapping[str, Any], *args: P.args, **kwargs: P.kwargs
) -> Handle[T]:
    """Start an actor of class `kind` and return at once.

    Args:
        options: what Ray needs to know (`num_cpus`, `max_concurrency`, ...).
        args, kwargs: go to the class. A failure there is the error of the first call.
    """
    return Handle(_actor_class(kind).options(**options).remote(*args, **kwargs))


@functools.cache
def _actor_class(kind: Callable[..., Any]) -> Any:
    import ray

    methods = [method for _, method in inspect.getmembers(kind, inspect.isfunction)]
    groups = {getattr(method, _GROUP): 1 for method in methods if hasattr(method, _GROUP)}
    return ray.remote(concurrency_groups=groups)(kind) if groups else ray.remote(kind)


@dataclass(frozen=True)
class Call(Generic[T_contra, R_co]):
    """A method with its arguments, to be asked of several actors; make it by `call`."""

    method: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @property
    def name(self) -> str:
        """The method's name, for reports."""
        return self.method.__name__

    def to(self, handle: Handle[T_contra]) -> Ref[R_co]:
        """Ask one actor."""
        return cast("Ref[R_co]", _submit(handle, self.method, self.args, self.kwargs))


@overload
def call(
    method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
) -> Call[T, R]: ...
@overload
def call(
    method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs
) -> Call[T, R]: ...
def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Call[Any, Any]:
    """A call to be asked of several actors."""
    return Call(method, args, kwargs)


@overload
def ask(
    handle: Handle[T],
    method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Ref[R]: ...
@overload
def ask(
    handle: Handle[T], method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs
) -> Ref[R]: ...
def ask(handle: Handle[Any], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Ref[Any]:
    """Call `method` of an actor and return at once; await the answer, or let it go.

    A reference among the arguments goes through `resolved`.
    """
    return cast("Ref[Any]", _submit(handle, method, args, kwargs))


def ask_pair(
    handle: Handle[T],
    method: Callable[Concatenate[T, P], Coroutine[Any, Any, tuple[A, B]]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> tuple[Ref[A], Ref[B]]:
    """Call a method that returns two values, to be fetched or passed on apart."""
    first, second = _submit(handle, method, args, kwargs, num_returns=2)
    return first, second


def _submit(
    handle: Handle[Any],
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    **options: Any,
) -> Any:
    remote = getattr(handle.actor, method.__name__)
    group = getattr(method, _GROUP, None)
    if group is not None:
        options["concurrency_group"] = group
    return (remote.options(**options) if options else remote).remote(*args, **kwargs)


def resolved(ref: Ref[R]) -> R:
    """A reference as an argument of a call, where the method takes the value.

    Ray gives the method the value, and fails the call if that is lost. Only a whole argument is
    resolved, not a reference inside a list.
    """
    return cast("R", ref)


def put(value: R) -> Ref[R]:
    """Put a value into Ray's object store."""
    import ray

    return cast("Ref[R]", ray.put(value))


def get_all(refs: Sequence[Ref[R]], timeout_s: float) -> list[R]:
    """Wait for values outside a coroutine.

    Raises:
        ray.exceptions.GetTimeoutError: one is not there after `timeout_s`.
        Exception: what a method raised.
    """
    import ray

    return cast("list[R]", ray.get(list(refs), timeout=timeout_s))


def node_address() -> str | None:
    """This node's address as Ray's other nodes know it; None outside of Ray."""
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else None
