"""What custom code gave back, checked where it comes back, with errors by its name; and plain data for JSON."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fedlora.errors import ContractError, cut

Arrays = dict[str, Any]


def who(owner: object, method: str) -> str:
    """A method as a line names it, such as `mine:RNone.aggregate`; a class of fedlora's by its name alone."""
    cls = owner if isinstance(owner, type) else type(owner)
    own = not cls.__module__.startswith("fedlora.")
    return f"{cls.__module__}:{cls.__qualname__}.{method}" if own else f"{cls.__qualname__}.{method}"


def wrong(name: str, value: object, instead: str) -> ContractError:
    """That a method returned something else than it should."""
    shown = "None" if value is None else f"a {type(value).__name__}"
    return ContractError(f"{name} returned {shown}; return {instead}")


def tensors(name: str, value: object) -> Arrays:
    """A mapping of arrays by name; numbers and whole numbers become float32.

    Raises:
        ContractError: it is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a mapping of arrays")
    made: Arrays = {}
    for key, tensor in value.items():
        if not isinstance(key, str):
            raise ContractError(
                f"{name} returned a {type(key).__name__} for a name; return a mapping of arrays by name"
            )
        if isinstance(tensor, np.generic):
            tensor = np.asarray(tensor)
        if not isinstance(tensor, np.ndarray) or tensor.dtype.kind not in "fiub":
            what = "None" if tensor is None else getattr(tensor, "dtype", type(tensor).__name__)
            raise ContractError(
                f"{name} returned {what} for {cut(key, 100)!r}; return a mapping of arrays of numpy"
            )
        made[key] = tensor if tensor.dtype in (np.float32, np.float64) else tensor.astype(np.float32)
    return made


def names(name: str, value: object) -> Collection[str]:
    """Names of tensors.

    Raises:
        ContractError: they are none.
    """
    if isinstance(value, str) or not isinstance(value, Collection):
        raise wrong(name, value, "names of tensors, such as a list of them")
    if odd := next((one for one in value if not isinstance(one, str)), None):
        raise ContractError(f"{name} returned a {type(odd).__name__} among names; return names of tensors")
    return value


def mapping(name: str, value: object, of: str) -> Mapping[str, Any]:
    """A mapping by name, with numpy's numbers as Python's.

    Raises:
        ContractError: it is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(name, value, f"a mapping of {of}")
    return {key: plain(one) for key, one in value.items()}


def plain(value: Any) -> Any:
    """A number of numpy's as one of Python's; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def figures(name: str, value: object) -> Mapping[str, float | None]:
    """Numbers by name, or None where one says nothing.

    Raises:
        ContractError: they are none.
    """
    told = mapping(name, value, "numbers by name")
    for key, number in told.items():
        if number is not None and not isinstance(number, int | float):
            raise ContractError(
                f"{name} returned a {type(number).__name__} for {cut(key)!r}; return numbers by name"
            )
    return told


def finite(value: Any) -> Any:
    """Plain data for JSON, which has no infinity: null instead of what is no finite number."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def check(
    what: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    merge: Mapping[str, tuple[Any, Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Make sure that what came of a round can be gone on with.

    Args:
        what: made it.
        before: the tensors that there were.
        after: the tensors that it made.
        merge: what it adds to the base.
        shapes: of the weight of each layer that can be added to, (out, in).

    Raises:
        ContractError: a tensor or a merge is not finite, or of another shape.
    """
    for module, sides in merge.items():
        if (sides[0].shape[:1] + sides[1].shape[1:]) != shapes.get(module):
            raise ContractError(f"{what} merges into {module}, which is no layer of that shape with factors")
        if not all(np.isfinite(side).all() for side in sides):
            raise ContractError(f"{what} merges what is not finite into {module}; try a lower lr")
    for name, tensor in after.items():
        if name not in before or tensor.shape != before[name].shape:
            raise ContractError(f"{what} gave {name} another shape, or made it up")
        if not np.isfinite(tensor).all():
            raise ContractError(f"{what} made {name} not finite; try a lower lr")
