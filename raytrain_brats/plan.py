"""What a run will take, what it costs, what limits it: `raytrain-brats plan --cases N --recipe NAME --gpus KIND:NODES`.

In: a number of cases, a recipe, machines (or a deadline, or a budget); the dated prices and rates of `planning/`.
Out: a table, and where it was asked for JSON and a picture; with --simulate the same by simulation. Starts nothing.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from raytrain_brats import cli, outputs, storage
from raytrain_brats import config as recipes
from raytrain_brats.cli import Changes, default, entry
from raytrain_brats.config import DEFAULT_RECIPE, Config
from raytrain_brats.errors import UserError
from raytrain_brats.planning import closed_form, prices, search, show
from raytrain_brats.planning import rates as rates_files
from raytrain_brats.planning.closed_form import Plan
from raytrain_brats.planning.demand import Fleet, demand
from raytrain_brats.planning.prices import Machine

Kind = Annotated[str, tyro.conf.arg(metavar="KIND:NODES", help_behavior_hint="")]
DATA, HEAD = "m6i.4xlarge", "m6i.2xlarge"
"""Of our cluster files."""
DRAWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Args:
    """Tell beforehand how long a run takes, what it costs on demand and on spot, and what limits it. Starts nothing."""

    cases: int
    """Labelled cases of the data set; a fifth of them is held out."""
    recipe: str = ""
    """A recipe, or a YAML file; by default RAYTRAIN_BRATS_RECIPE, else segresnet."""
    set: Changes = ()
    """Change a setting of the recipe: KEY=VALUE, such as train.global_batch=64; may be given several times."""
    route: Literal["store", "raw"] = "store"
    """Whether the cases are prepared once before, or the scans preprocessed while they are read."""
    gpus: Kind = ""
    """Training nodes, such as p4d.24xlarge:2, the default. With --deadline or --budget the kind alone counts."""
    data_nodes: Kind = ""
    """Nodes that only read and preprocess, such as m6i.4xlarge:4; by default none."""
    cluster: str = ""
    """Take the machines of a cluster's YAML instead, as many as it allows."""
    spot: bool = False
    """Training and data nodes on spot."""
    epochs: int = 0
    """Instead of the recipe's."""
    deadline: float = 0.0
    """Find the cheapest machines that are done within so many hours."""
    budget: float = 0.0
    """Find the fastest machines that cost at most so many USD."""
    rates: tuple[str, ...] = ()
    """Your own, instead of the project's: files as planning/rates.yaml, or what scripts/bench data and step wrote."""
    simulate: bool = False
    """Also simulate the run, with kills and joins when on spot."""
    seed: int = 0
    """Of the simulation."""
    json: str = ""
    """File for all figures."""
    picture: str = ""
    """File for a chart (.png): time against GPUs, with the limits drawn."""
    overwrite: bool = False
    """Also replace a file that this command did not make of the same request; never an image or a label."""


def work(args: Args) -> None:
    given = default(args.recipe, "RECIPE")
    recipe = given or "segresnet"
    config, rates = _config(args, recipe), rates_files.load(args.rates)
    head, data = prices.machine(HEAD), prices.machine(DATA)
    spot = args.spot

    def plan_of(fleet: Fleet) -> Plan:
        return closed_form.plan(demand(config, recipe, args.cases, fleet, rates, args.route), fleet)

    runner_up: Plan | None = None
    if args.deadline or args.budget:
        if args.data_nodes:
            data, _ = prices.nodes(args.data_nodes, "--data-nodes")
        candidates = search.fleets(_kinds(args, rates), data, head, spot, config.train.global_batch)
        chosen, runner_up = search.best(candidates, plan_of, args.deadline or None, args.budget or None)
    else:
        chosen = plan_of(_fleet(args, head, data))
    _check_files(args)
    rates.used.clear()
    chosen = plan_of(chosen.fleet)  # notes the rates of this one alone
    request = f"{args.cases:,} cases, {args.route}; {recipes.described(recipe, config)}"
    simulated = None
    if args.simulate:
        from raytrain_brats.planning import simulation

        simulated = simulation.simulate(chosen.demand, args.seed)
    notes = dict(rates.used)
    made = _made(args)
    if args.json:
        used = {name: vars(rate) for name, rate in notes.items()}
        facts: dict[str, Any] = {"plan": chosen.facts(), "runner_up": runner_up and runner_up.facts(), "rates": used}
        facts |= {
            "simulated": simulated and vars(simulated),
            "prices": {k: prices.table("ec2")[k] for k in ("date", "region")},
        }
        storage.write_bytes(args.json, (json.dumps(made | facts, indent=1, default=str) + "\n").encode())
    if args.picture:
        drawn = [plan_of(fleet) for fleet in _drawn(chosen.fleet, config.train.global_batch)]
        storage.write_bytes(args.picture, show.picture(request, drawn, chosen, _picture_of(args)))
    if not given:
        print(f"no --recipe is given: {recipe}, whose rates are known for most GPUs; `train` takes {DEFAULT_RECIPE}")
    cli.show(show.table(request, chosen, runner_up, vars(simulated) if simulated else None))
    cli.show(show.used(notes))


def _drawn(fleet: Fleet, batch: int) -> list[Fleet]:
    """More and fewer GPUs of its kind: parts of one node, then whole nodes."""
    kind, most = fleet.train, max(batch, fleet.gpus)
    parts = [replace(fleet, nodes=1, train=replace(kind, gpus=n)) for n in DRAWN if n < kind.gpus and n & (n - 1) == 0]
    return parts + [replace(fleet, nodes=n) for n in DRAWN if (n - 1) * kind.gpus < most]


def _config(args: Args, recipe: str) -> Config:
    changes = (*args.set, *([f"train.epochs={args.epochs}"] if args.epochs else []))
    config = recipes.load(recipe, changes)
    if args.cases < 2:
        raise UserError(f"--cases {args.cases}: 2 at least, one to train on and one held out")
    if args.epochs < 0 or args.deadline < 0 or args.budget < 0:
        raise UserError("--epochs, --deadline and --budget are positive numbers")
    if args.deadline and args.budget:
        raise UserError("--deadline and --budget are two questions; ask one")
    if args.cluster and (args.gpus or args.data_nodes or args.deadline or args.budget):
        raise UserError("--cluster names all machines; leave --gpus, --data-nodes, --deadline and --budget away")
    return config


def _kinds(args: Args, rates: rates_files.Rates) -> list[Machine]:
    """Of the search: the kind that was named, else all whose GPU has rates."""
    if args.gpus:
        return [prices.nodes(args.gpus, "--gpus")[0]]
    known = [prices.machine(kind) for kind in prices.table("ec2")["instances"]]
    usable = [m for m in known if m.gpu in rates.steps()]
    return [m for m in usable if m.spot] if args.spot else usable


def _fleet(args: Args, head: Machine, data: Machine) -> Fleet:
    if args.cluster:
        return _of_cluster(args.cluster, args.spot)
    train, nodes = prices.nodes(args.gpus or "p4d.24xlarge:2", "--gpus")
    if not train.gpus:
        raise UserError(f"--gpus {args.gpus}: {train.kind} has no GPU; give such machines with --data-nodes")
    data, data_nodes = prices.nodes(args.data_nodes, "--data-nodes") if args.data_nodes else (data, 0)
    return Fleet(train, nodes, data, data_nodes, head, args.spot)


def _of_cluster(path: str, spot: bool) -> Fleet:
    """The most that a cluster's YAML allows. Raises UserError."""
    try:
        types = yaml.safe_load(Path(path).read_bytes())["available_node_types"]
        found = {about["labels"]["role"]: about for about in types.values()}
        kinds = {role: prices.machine(about["node_config"]["InstanceType"], path) for role, about in found.items()}
        train, data = found["train"], found.get("data", {})
        on_spot = spot or "InstanceMarketOptions" in train["node_config"]
        most = int(train["max_workers"]), int(data.get("max_workers", 0))
        return Fleet(kinds["train"], most[0], kinds.get("data", kinds["head"]), most[1], kinds["head"], on_spot)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--cluster {path}: it has no nodes of the roles head and train ({error!r}); cluster/p4d.yaml has"
        ) from error


def _made(args: Args) -> dict[str, Any]:
    asked = {name: value for name, value in vars(args).items() if name not in ("json", "picture", "overwrite")}
    return {"made_by": "raytrain-brats plan", "asked": json.loads(json.dumps(asked))}


def _picture_of(args: Args) -> str:
    return outputs.picture_of("plan", _made(args)["asked"])


def _check_files(args: Args) -> None:
    """Raises UserError when a file that is none of ours would be replaced."""

    def ours(content: bytes) -> bool:
        try:
            return bool(_made(args).items() <= json.loads(content).items())
        except (ValueError, AttributeError):
            return False

    if args.json:
        outputs.claim_file(args.json, ours, overwrite=args.overwrite, option="--json")
    if args.picture:
        outputs.claim_picture(args.picture, _picture_of(args), args.overwrite)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "plan", argv)


if __name__ == "__main__":
    sys.exit(main())
