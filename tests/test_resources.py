"""The data files that users edit are found in a source tree and in an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4tools import resources
from dsv4tools.errors import ResourceError
from dsv4tools.resources import data_directory


@pytest.fixture(autouse=True)
def _forget():
    data_directory.cache_clear()
    yield
    data_directory.cache_clear()


@pytest.mark.parametrize(("name", "file"), [("templates", "deepseek4.toml"), ("policies", "q4k.toml")])
def test_the_directories_that_there_are(name, file):
    assert (data_directory(name) / file).is_file()


def test_inside_the_package_before_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "dsv4tools"
    (tmp_path / "policies").mkdir()
    package.mkdir()
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    assert data_directory("policies") == tmp_path / "policies"
    (package / "policies").mkdir()
    data_directory.cache_clear()
    assert data_directory("policies") == package / "policies"


def test_an_installation_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "dsv4tools" / "resources.py"))
    with pytest.raises(ResourceError, match="policies: is missing from the installation; install dsv4tools again"):
        data_directory("policies")


def test_the_wheel_carries_both():
    import tomllib  # noqa: PLC0415  - only here

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {name: f"dsv4tools/{name}" for name in ("templates", "policies")}
