"""The Grafana dashboard, and what it asks Prometheus for."""

import json
import re

from tests.support import ROOT

GRAFANA = ROOT / "cluster" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "raytrain_brats.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def asked() -> set[str]:
    """Metrics that the dashboard's queries name."""
    return {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}
