"""One's own network, loss or augmentation, found by its name `package.module:Name`. Runs in any process.

In: an `OwnPart` of a recipe: the name, and options beside it.
Out: the class or function with its options; its file and checksum; UserError that says in one line what is missing.

Only names travel: each process imports the module itself, from the current folder (Ray puts the driver's on its
workers' path, and a job's working directory is theirs) or from what is installed.
"""

import contextlib
import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from raytrain_brats.errors import UserError

_NAME = r"[A-Za-z_]\w*"
_WHOLE = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")
SHAPES = "must be a class or function as docs/own-parts.md says"


class OwnPart(BaseModel):
    """`package.module:Name`, or a section with that `name` and options beside it, which the part itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    """Module and name; options of its own stand beside it."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _names_one(cls, value: str) -> str:
        if not _WHOLE.fullmatch(value):
            raise ValueError("write it as package.module:Name, such as my_networks:Small")
        return value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def find(name: str) -> Any:
    """What `package.module:Name` names. Raises UserError when it is not there, or when its module fails."""
    module, _, attribute = name.partition(":")
    found = _module(module, name)
    if not hasattr(found, attribute):
        near = difflib.get_close_matches(attribute, [n for n in vars(found) if not n.startswith("_")], n=1)
        hint = f"; did you mean {module}:{near[0]}?" if near else ""
        raise UserError(f"{name}: {_file(found) or module} has no {attribute}{hint}")
    part = getattr(found, attribute)
    if not callable(part):
        raise UserError(f"{name} is of type {type(part).__name__}; it {SHAPES}")
    return part


def _module(module: str, name: str) -> Any:
    with contextlib.suppress(OSError):  # a folder that was removed: what is installed may do
        if (here := os.getcwd()) not in sys.path and "" not in sys.path:
            sys.path.append(here)  # last: a file of the folder hides no library. A command's path has not this folder
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            raise UserError(
                f"{name}: there is no module {missing} in {_here()} or among what is installed; start from the folder "
                "that holds it, or install it (docs/own-parts.md)"
            ) from error
        raise UserError(f"{name}: its module needs {missing}, which is not installed") from error
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{name}: its module cannot be imported ({text})") from error


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "the current folder, which was removed,"


def arguments(part: OwnPart, key: str, given: int = 0) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(class or function, arguments, keyword arguments) that the part's options make, beyond the first `given`.

    One argument, its own pydantic model `Options`, where it has one; else the options by name, as they are. `key` is
    where it stands in the recipe. Raises UserError for options that it does not take.
    """
    found, where = find(part.name), f"{key} {part.name}"
    model = getattr(found, "Options", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        try:
            return found, (model.model_validate(part.options),), {}
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = ".".join(map(str, first["loc"])) or "options"
            message = first["msg"].removeprefix("Value error, ")
            known = f"; there are {', '.join(model.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise UserError(f"{where}: {option}: {message} (got {first['input']!r}){known}") from error
    with contextlib.suppress(ValueError):  # one without a signature says itself what is wrong
        signature = inspect.signature(found)
        try:
            signature.bind(*[None] * (0 if isinstance(found, type) else given), **part.options)
        except TypeError as error:
            raise UserError(f"{where}: {error}; it is {part.name.partition(':')[2]}{signature}") from error
    return found, (), part.options


@lru_cache(maxsize=8)
def function(part: OwnPart, key: str, given: int) -> Callable[..., Any]:
    """What to call with `given` arguments: the function with its options, or an instance of the class. Raises
    UserError."""
    found, more, named = arguments(part, key, given)
    if isinstance(found, type):
        made = construct(found, part, key, *more, **named)
        if not callable(made):
            raise UserError(f"{key} {part.name} cannot be called; it {SHAPES}")
        return made  # type: ignore[no-any-return]
    return lambda *tensors: found(*tensors, *more, **named)


def construct(found: type, part: OwnPart, key: str, *more: Any, **named: Any) -> Any:
    """An instance of one's own class. Raises UserError for whatever its constructor raises."""
    try:
        return found(*more, **named)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{key} {part.name} cannot be made with these options ({text})") from error


def divisor(part: OwnPart) -> int:
    """What the edges of its patches must be multiples of, by the class's word (`divisor`); 1 without. Raises
    UserError."""
    stated = getattr(find(part.name), "divisor", 1)
    if type(stated) is not int or stated < 1:
        raise UserError(f"network.name {part.name}: divisor is {stated!r}; give the class a whole number from 1 on")
    return stated


def sources(parts: Iterable[OwnPart]) -> dict[str, dict[str, str]]:
    """{name: {"file", "sha256"}} of these parts' modules, for a run's record. Raises UserError."""
    found = {}
    for part in parts:
        find(part.name)
        file = _file(sys.modules[part.name.partition(":")[0]])
        content = Path(file).read_bytes() if file else b""
        found[part.name] = {"file": file, "sha256": hashlib.sha256(content).hexdigest()[:16] if file else ""}
    return found


def _file(module: Any) -> str:
    with contextlib.suppress(TypeError, OSError):
        return inspect.getsourcefile(module) or ""
    return ""


def changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """In words, which files are others than those that a run recorded."""
    return [
        f"{now[name]['file']} ({name}) was changed since: its checksum was {old['sha256']}, now it is "
        f"{now[name]['sha256']}"
        for name, old in before.items()
        if name in now and old.get("sha256") != now[name]["sha256"]
    ]
