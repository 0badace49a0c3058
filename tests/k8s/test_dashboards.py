"""The dashboards as files: Grafana itself is not here, so what it would stumble over is
looked for.
"""

from __future__ import annotations

import json
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.queries import (
    DASHBOARDS,
    OTHERS,
    SETTINGS,
    dashboard_queries,
    metrics_in,
    recorded,
    served,
)
from tests.requirements import GRAFANA, grafana

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_panels_have_ids_of_their_own_and_lie_beside_one_another(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one['title']!r} and {other['title']!r} lie on each other"


def test_where_the_data_comes_from_is_for_the_reader_to_choose(dashboard: dict[str, Any]) -> None:
    [chosen] = [
        variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource"
    ]
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    for panel in dashboard["panels"]:
        for asking in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert asking["datasource"] == SOURCE, panel["title"]
    assert all(
        variable["datasource"] == SOURCE
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    )


def test_a_panels_queries_have_names_of_their_own(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        names = [target["refId"] for target in panel.get("targets", [])]
        assert len(names) == len(set(names)), panel["title"]
        assert names or panel["type"] == "row", f"{panel['title']} shows nothing"


def test_a_dashboard_asks_only_for_what_somebody_tells(dashboard: dict[str, Any]) -> None:
    known = served() | recorded() | SETTINGS | OTHERS
    for name, query in dashboard_queries():
        found = metrics_in(query)
        assert found, f"{name} asks for nothing: {query}"
        assert found <= known, (
            f"{name} asks for {', '.join(sorted(found - known))}, which nobody tells"
        )


def test_a_dashboard_shows_one_release_at_a_time() -> None:
    for name, query in dashboard_queries():
        for asked in query.split("{")[1:]:
            selectors = asked.partition("}")[0]
            assert 'namespace="$namespace"' in selectors, f"{name} adds up namespaces: {query}"
            assert 'release="$release"' in selectors or 'container="drbert"' in selectors, (
                f"{name} adds up releases: {query}"
            )


@grafana
def test_a_dashboard_is_of_grafanas_own_type(dashboard: dict[str, Any], tmp_path: Path) -> None:
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


def test_two_dashboards_do_not_share_an_address() -> None:
    names = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(names) == len(set(names))
