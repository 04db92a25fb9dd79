"""The wall around Ray: what an upgrade of Ray must still have, and that nobody else names a private symbol."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import ray.train

import raytrain_brats
from raytrain_brats.ray_ext.internals import core, data, ec2, train

ROOT = Path(raytrain_brats.__file__).parent
WALL = ROOT / "ray_ext" / "internals"
PRIVATE = re.compile(r"\bray\.(\w+\.)*_\w+|\bray\.core\.generated\b|\binternal_kv\b")


def test_ray_has_every_private_name_that_is_used() -> None:
    """All that is gone is told at once: module, object or attribute."""
    gone = []
    for module in (core, data, ec2, train):
        for where, attributes in module.ATTRIBUTES.items():
            try:
                found = _resolved(where)
            except (ImportError, AttributeError, KeyError) as error:
                gone.append(f"{where}: {error}")
                continue
            gone += [f"{where}: no {name}" for name in attributes if not hasattr(found, name)]
    assert not gone, "\n".join(gone)


def _resolved(where: str) -> Any:
    """`package.module:Object`, `:Object()` for one made, `:Class.method()` for what that gives; or a module."""
    name, _, path = where.partition(":")
    found: Any = importlib.import_module(name)
    if path == "ScalingConfig()":
        return ray.train.ScalingConfig()
    if path == "PreemptingState()":
        return found.PreemptingState(None, 0.0)
    if path == "_AutoscalingCoordinatorActor()":
        return found._AutoscalingCoordinatorActor(lambda: 0.0, lambda *_, **__: None, list)
    for part in filter(None, path.removesuffix("()").split(".")):
        found = vars(found)[part] if name.startswith("ray.core.generated") else getattr(found, part)
    return found() if path.endswith("()") else found


def test_a_name_that_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(core.ATTRIBUTES, "ray._private.services", ("no_such_function",))
    monkeypatch.setitem(core.ATTRIBUTES, "ray._private.no_such_module", ())
    with pytest.raises(AssertionError, match=r"(?s)no_such_module.*|no no_such_function"):
        test_ray_has_every_private_name_that_is_used()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_ray_stand_behind_the_wall(path: Path) -> None:
    """No import, no attribute and no text outside `ray_ext/internals` names one."""
    if WALL in path.parents:
        return
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "ray"]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.append(node.value)
    assert not [name for name in found if PRIVATE.search(name)]
