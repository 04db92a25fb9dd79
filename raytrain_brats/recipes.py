"""What recipes there are: `raytrain-brats recipes [NAME]`.

In: the name of a recipe, or none.
Out: a line for each recipe; of one every setting with its meaning, as a YAML file that is a recipe itself.
"""

import ast
import inspect
import itertools
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import tyro
import yaml
from pydantic import BaseModel

from raytrain_brats import config
from raytrain_brats.cli import entry
from raytrain_brats.config import Config

_WIDTH = 110


@dataclass(frozen=True)
class Args:
    """List the recipes, or show one with every setting and what it means."""

    name: tyro.conf.Positional[str] = ""
    """The recipe to show, or a YAML file, also a run's config.yaml; without it all are listed."""


def work(args: Args) -> None:
    if args.name:
        found = config.load(args.name)
        print("\n".join(f"# {line}".rstrip() for line in header(args.name)))
        print("\n".join(lines(found)))
        return
    names = config.recipe_names()
    for name in names:
        what = header(name)[0].rstrip(".")
        print(f"{name:{max(map(len, names))}}  {what}. {config.described('', config.load(name))}")


def header(recipe: str) -> list[str]:
    """The lines at the top of a recipe: what it is, then its hardware, hours and Dice."""
    text = config.read_recipe(recipe).decode().splitlines()
    return [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), text)]


def lines(part: BaseModel, indent: str = "") -> list[str]:
    """YAML of every setting below a section, each after its meaning."""
    found = []
    for name, field in type(part).model_fields.items():
        key, value = field.alias or name, getattr(part, name)
        if isinstance(value, BaseModel):
            about = inspect.cleandoc(type(value).__doc__ or "") if type(value).__doc__ else ""
            found += [
                *([""] if not indent else []),
                *_comment(about, indent),
                f"{indent}{key}:",
                *lines(value, indent + "  "),
            ]
            continue
        found += _comment(meanings(type(part)).get(name, ""), indent)
        shown = part.model_dump(mode="json", by_alias=True)[key]
        text = yaml.safe_dump(shown, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
        found.append(f"{indent}{key}: {text}")
    return found


def _comment(text: str, indent: str) -> list[str]:
    width = _WIDTH - len(indent)
    return [f"{indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), width)]


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """{setting: its meaning} of a section, from the strings below its fields."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _told(inspect.getmodule(kind) or config).get(kind.__name__, {})
    return found


@cache
def _told(module: ModuleType) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            told = found.setdefault(node.name, {})
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    told[field.target.id] = _string(after)
    return found


def _string(node: Any) -> str:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return str(node.value.value) if constant and isinstance(node.value.value, str) else ""


def settings(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """{key: meaning} of every setting there is, those of all networks included."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        key, parts = f"{prefix}{field.alias or name}", config.sections_of(field.annotation)
        for part in parts:
            found |= settings(part, f"{key}.")
        meaning = meanings(section).get(name, "")
        if meaning or not parts:  # also of a value that may be a section
            found[key] = meaning
    return found


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "recipes", argv)


if __name__ == "__main__":
    sys.exit(main())
