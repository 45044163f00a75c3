"""Promises about the repository itself."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.settings import load_settings

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_no_name_in_recipe_shadows_a_library():
    """accelerate launch puts recipe/ first on sys.path, so `import NAME` would find ours."""
    ours = {path.stem for path in (REPOSITORY / "recipe").iterdir() if path.suffix in ("", ".py")}
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    required = re.findall(r"^([\w-]+)", setup["options"]["install_requires"], re.M)
    libraries = {name.lower().replace("-", "_") for name in required} | {"yaml", "tokenizers"}
    assert not ours & (set(sys.stdlib_module_names) | libraries)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_each_config_is_valid_short_and_introduced(config):
    text = config.read_text()
    assert len(text.splitlines()) <= 40
    assert re.search(r"# Hardware:(.|\n#)*20\d\d-\d\d-\d\d", text), "measured when?"
    for word in ("# Trains:", "# Hardware:", "# Launch:", "# Override:"):
        assert word in text
    load_settings(str(config))


def test_the_three_configs_are_there():
    assert {"lora_alpaca.yaml", "report_200.yaml", "starter.yaml"} <= {c.name for c in CONFIGS}


def test_what_readme_names_exists():
    readme = (REPOSITORY / "README.md").read_text()
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", readme)) <= targets
    for name in set(re.findall(r"\b((?:recipe|configs|launch|tests|docs)/[\w./-]+\w)", readme)):
        assert (REPOSITORY / name).exists(), name


def test_make_alone_prints_help():
    result = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for target in ("setup", "train", "infer", "test", "check"):
        assert re.search(rf"^  make {target}\s", result.stdout, re.M)


def test_constraints_pin_every_requirement_inside_the_declared_range():
    from packaging.requirements import Requirement
    from packaging.version import Version

    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    pins = dict(
        line.lower().split("==")
        for line in (REPOSITORY / ".ci/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for requirement in (Requirement(line) for line in lines if line):
        assert Version(pins[requirement.name.lower()]) in requirement.specifier
    assert pins["torch"] == "2.13.0"
