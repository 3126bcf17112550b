"""Plug-ins arrive by name: `ffa_lora`, or `package.module:Class` from anywhere.

Each shelf is a folder with one file for each plug-in, found by its name in the tree.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fedlora import plain
from fedlora.errors import SettingError, suggestion

T = TypeVar("T")
Shelf = Literal["strategies", "clients", "tasks", "kinds", "schedules", "compressors"]


class _About(NamedTuple):
    key: str  # of a scenario, that names one
    one: str  # what one is called
    beside: tuple[str, ...] = ()  # modules of the folder that are no plug-ins


_OF_TASKS = (
    "adapted",
    "base_model",
    "contract",
    "dialogues",
    "encoding",
    "heads",
    "loading",
    "located",
    "smaller",
    "weights",
    "windows",
)
_SHELVES: Mapping[Shelf, _About] = {
    "strategies": _About("strategy.use", "strategy"),
    "clients": _About("clients.use", "client"),
    "tasks": _About("task", "task", _OF_TASKS),
    "kinds": _About(
        "model.adapter.kind", "kind of adapter", ("averages", "contract", "frames", "modules", "targets")
    ),
    "schedules": _About("model.adapter.schedule.kind", "schedule of the adapter", ("contract", "levels")),
    "compressors": _About("compress.use", "compressor", ("contract", "noised", "pruner")),
}


def names(shelf: Shelf) -> list[str]:
    """The built-in names of a shelf, such as one per module of `fedlora.strategies`."""
    folder, beside = Path(__file__).parent / shelf, _SHELVES[shelf].beside
    found = (m.name for m in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in found if not name.startswith("_") and name not in beside)


def summary(shelf: Shelf, name: str) -> str:
    """The first line of a built-in's class docstring, read from its file without importing it."""
    module = ast.parse((Path(__file__).parent / shelf / f"{name}.py").read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.ClassDef) and (text := ast.get_docstring(node)):
            return text.splitlines()[0]
    return ""


def source(shelf: Shelf, name: str) -> str:
    """The address of the paper that a built-in's file opens with; empty where it names none."""
    text = (Path(__file__).parent / shelf / f"{name}.py").read_text(encoding="utf-8")
    found = re.search(r"https://arxiv\.org/abs/[0-9.v]*[0-9]", ast.get_docstring(ast.parse(text)) or "")
    return found.group() if found else ""


def problem(shelf: Shelf, use: str) -> str | None:
    """What is wrong with a name, or None; looks at files only and imports nothing."""
    if ":" in use:
        module, _, cls = use.partition(":")
        if module and cls.isidentifier() and all(part.isidentifier() for part in module.split(".")):
            return None
        return f"{use!r} should read 'package.module:Class'"
    if use in names(shelf):
        return None
    one = _SHELVES[shelf].one
    return f"unknown {one} {use!r}: {suggestion(use, names(shelf))}; or 'module:Class' for one of your own"


def find(shelf: Shelf, use: str) -> type[Any]:
    """The class behind a name.

    A built-in module holds one public class of its own; that is the one.

    Raises:
        SettingError: nothing importable has that name.
    """
    key = _SHELVES[shelf].key
    if wrong := problem(shelf, use):
        raise SettingError(key, wrong)
    if ":" not in use:
        return next(_classes(importlib.import_module(f"fedlora.{shelf}.{use}")))
    path, _, name = use.partition(":")
    held = module(key, path)
    if not isinstance(found := getattr(held, name, None), type):
        known = [n for n, v in vars(held).items() if isinstance(v, type)]
        raise SettingError(key, f"module {path!r} has no class {name!r}: {suggestion(name, known)}")
    return found


def module(key: str, path: str) -> Any:
    """A custom module, which the setting `key` names.

    Raises:
        SettingError: it cannot be imported.
    """
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise SettingError(key, f"cannot import {path!r} ({error}); is its folder on PYTHONPATH?") from error
    except Exception as error:  # somebody's own code
        raise SettingError(key, f"cannot import {path!r}: {type(error).__name__}: {error}") from error


def find_of(shelf: Shelf, use: str, contract: type[T]) -> type[T]:
    """The class behind a name, which keeps a contract.

    Raises:
        SettingError: nothing importable has that name, it is no such class, or it lacks a method.
    """
    key, cls = _SHELVES[shelf].key, find(shelf, use)
    if not issubclass(cls, contract):
        raise SettingError(key, f"{use} is no fedlora.{contract.__name__}")
    if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
        raise SettingError(key, f"{use} lacks {', '.join(lacking)}")
    return cls


def build(cls: type[Any], options: Mapping[str, Any], section: str) -> Any:
    """An instance of a plug-in with its options checked by name.

    Raises:
        SettingError: an option is unknown, or the class refuses its value.
    """
    parameters = inspect.signature(cls).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for name in options:
        if name not in known and len(known) == len(parameters):
            hint = _of_others(section, name) or (suggestion(name, known) if known else "it takes none")
            raise SettingError(f"{section}.{name}", f"{called(cls)} has no option {name!r}: {hint}")
        if wrong := _misfit(cls, name, options[name]):
            raise SettingError(f"{section}.{name}", f"{wrong}, not {plain.shown(options[name])}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        at = next((f"{section}.{name}" for name in options if name in str(error)), f"{section}.use")
        raise SettingError(at, f"{called(cls)}: {error}") from error


def called(cls: type[Any]) -> str:
    """A plug-in's class as a scenario names it: `ffa_lora`, or `module:Class`."""
    path, _, name = cls.__module__.rpartition(".")
    return name if path in {f"fedlora.{shelf}" for shelf in _SHELVES} else f"{cls.__module__}:{cls.__qualname__}"


def _of_others(section: str, option: str) -> str:
    """Which built-ins of a section have an option; empty where none has it."""
    shelf = next((shelf for shelf, about in _SHELVES.items() if about.key == f"{section}.use"), None)
    have = [n for n in names(shelf) if option in inspect.signature(find(shelf, n)).parameters] if shelf else []
    return f"{' and '.join(have)} {'has' if len(have) == 1 else 'have'} it" if have else ""


def _misfit(cls: type[Any], name: str, value: object) -> str | None:
    """What an option should be, by its annotation; None where it is, or nothing is said that can be checked."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        hints = typing.get_type_hints(cls) | typing.get_type_hints(cls.__init__)
        of = TypeAdapter(hints.get(name, Any), config=ConfigDict(arbitrary_types_allowed=True))
        made = of.validate_python(value)
    except ValidationError as error:
        return plain.words(error.errors()[0]).partition(",")[0]
    except (NameError, TypeError, PydanticUserError):
        return None  # names of types that are not imported, or types that pydantic does not know
    if isinstance(value, str | bool) and isinstance(made, int | float) and type(made) is not type(value):
        return plain.words({"type": f"{type(made).__name__}_type"})  # "0.5" is read as 0.5, and stays text
    return None


def _classes(module: Any) -> Iterator[type[Any]]:
    for name, value in vars(module).items():
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield value
