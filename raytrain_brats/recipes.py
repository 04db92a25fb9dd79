"""What recipes there are: `raytrain-brats recipes [NAME]`.

In: the name of a recipe, or none.
Out: a line for each recipe; of one its file: hardware, hours and Dice at the top, then its settings.
"""

import sys
from dataclasses import dataclass

import tyro

from raytrain_brats import config
from raytrain_brats.cli import entry


@dataclass(frozen=True)
class Args:
    """List the recipes, or show one."""

    name: tyro.conf.Positional[str] = ""
    """The recipe to show, or a YAML file; without it all are listed."""


def work(args: Args) -> None:
    if args.name:
        config.load(args.name)  # a file of the user's is checked
        print(config.recipe_text(args.name), end="")
        return
    names = config.recipe_names()
    for name in names:
        what = config.header(name)[0].rstrip(".")
        print(f"{name:{max(map(len, names))}}  {what}. {config.described('', config.load(name))}")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "recipes", argv)


if __name__ == "__main__":
    sys.exit(main())
