"""The dashboards as files, checked for the faults that Grafana would report."""

from __future__ import annotations

import json
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.queries import (
    DASHBOARDS,
    FOREIGN,
    SETTINGS,
    dashboard_queries,
    metrics_in,
    recorded_series,
    service_series,
)
from tests.requirements import GRAFANA, grafana

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_panels_have_unique_ids_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        position = panel["gridPos"]
        assert 0 <= position["x"] < position["x"] + position["w"] <= 24, panel["title"]
    for panel, other in combinations(panels, 2):
        a, b = panel["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{panel['title']!r} and {other['title']!r} overlap"


def test_the_data_source_is_a_variable(dashboard: dict[str, Any]) -> None:
    [source] = [
        variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource"
    ]
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        for reader in [panel, *panel.get("targets", [])]:
            assert reader["datasource"] == SOURCE, panel["title"]
    assert all(
        variable["datasource"] == SOURCE
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    )


def test_the_queries_of_a_panel_have_unique_names(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        names = [target["refId"] for target in panel.get("targets", [])]
        assert len(names) == len(set(names)), panel["title"]
        assert names or panel["type"] == "row", f"{panel['title']} shows nothing"


def test_a_dashboard_reads_only_series_that_exist(dashboard: dict[str, Any]) -> None:
    known = service_series() | recorded_series() | SETTINGS | FOREIGN
    for name, query in dashboard_queries():
        series = metrics_in(query)
        assert series, f"{name} reads no series: {query}"
        assert series <= known, (
            f"{name} reads {', '.join(sorted(series - known))}, which does not exist"
        )


def test_a_dashboard_shows_one_release_at_a_time() -> None:
    for name, query in dashboard_queries():
        for part in query.split("{")[1:]:
            selectors = part.partition("}")[0]
            assert 'namespace="$namespace"' in selectors, f"{name} adds up namespaces: {query}"
            assert 'release="$release"' in selectors or 'container="drbert"' in selectors, (
                f"{name} adds up releases: {query}"
            )


@grafana
def test_a_dashboard_fits_the_types_of_grafana(dashboard: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(GRAFANA)
    source = tmp_path / "dashboard.ts"
    source.write_text(
        "import type { Dashboard } from"
        ' "./node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen";\nexport const'
        f" dashboard: Dashboard = {json.dumps(dashboard, indent=2)};\n"
    )
    compiler = GRAFANA / "typescript" / "bin" / "tsc"
    done = subprocess.run(
        ["node", str(compiler), "--noEmit", "--strict", "--skipLibCheck", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_dashboards_have_unique_addresses() -> None:
    names = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(names) == len(set(names))
