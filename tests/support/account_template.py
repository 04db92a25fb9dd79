"""cluster/aws/account.yaml as plain data, for tests: what CloudFormation makes of it, with names filled in.

In: the template; values of its parameters and of AWS's own.
Out: resources by logical name; the IAM actions that a role or a launcher is given.
"""

from typing import Any

import yaml

from tests.support import ROOT

TEMPLATE = ROOT / "cluster" / "aws" / "account.yaml"
OWN = {"AWS::Partition": "aws", "AWS::Region": "us-west-2", "AWS::AccountId": "123456789012"}
GIVEN = {"DataBucket": "the-data", "RunsBucket": "the-runs"}


class _Loader(yaml.SafeLoader):
    pass


def _intrinsic(loader: Any, suffix: str, node: Any) -> dict[str, Any]:
    kinds = {yaml.ScalarNode: "construct_scalar", yaml.SequenceNode: "construct_sequence"}
    made = getattr(loader, kinds[type(node)])(node, **({"deep": True} if isinstance(node, yaml.SequenceNode) else {}))
    return {f"!{suffix}": made}


_Loader.add_multi_constructor("!", _intrinsic)


def resources(values: dict[str, str] = OWN | GIVEN) -> dict[str, Any]:
    """Every resource with !Sub and !Ref of known names resolved."""
    template = yaml.load(TEMPLATE.read_text(), _Loader)
    return {name: _resolve(what, values) for name, what in template["Resources"].items()}


def _resolve(part: Any, values: dict[str, str]) -> Any:
    if isinstance(part, list):
        return [_resolve(one, values) for one in part]
    if not isinstance(part, dict):
        return part
    if "!Sub" in part:
        text = part["!Sub"]
        for name, value in values.items():
            text = text.replace(f"${{{name}}}", value)
        return text.replace("${!", "${")
    if "!Ref" in part:
        return values.get(part["!Ref"], part["!Ref"])
    if "!GetAtt" in part:  # known only once it is made
        return f"arn:aws:made:{values['AWS::Region']}:{values['AWS::AccountId']}:{part['!GetAtt']}"
    return {key: _resolve(value, values) for key, value in part.items()}


def statements(name: str, values: dict[str, str] = OWN | GIVEN) -> list[dict[str, Any]]:
    """Of a role (with its managed policies), a managed policy, a bucket or key policy: by its logical name."""
    found = resources(values)[name]["Properties"]
    documents = [policy["PolicyDocument"] for policy in found.get("Policies", [])]
    documents += [found[key] for key in ("PolicyDocument", "KeyPolicy") if key in found]
    own = [statement for document in documents for statement in document["Statement"]]
    return own + [s for policy in found.get("ManagedPolicyArns", []) for s in statements(policy, values)]


def actions(*names: str) -> set[str]:
    """All that these roles or policies allow."""
    allowed = [s["Action"] for name in names for s in statements(name) if s["Effect"] == "Allow"]
    return {action for one in allowed for action in ([one] if isinstance(one, str) else one)}
