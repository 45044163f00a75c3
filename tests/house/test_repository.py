"""Promises about the repository itself."""

import ast
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
    assert len(text.splitlines()) <= (40 if "study:" not in text else 60)
    assert re.search(r"# Hardware:(.|\n#)*20\d\d-\d\d-\d\d", text), "measured when?"
    for word in ("# Trains:", "# Hardware:", "# Launch:", "# Override:"):
        assert word in text
    load_settings(str(config))


def test_the_three_configs_are_there():
    assert {"lora_alpaca.yaml", "report_200.yaml", "starter.yaml"} <= {c.name for c in CONFIGS}


def test_what_readme_names_exists():
    readme = (REPOSITORY / "README.md").read_text()
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`|\$ )make ([a-z][\w-]*)", readme, re.M)) <= targets
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


# What runs whatever it is given, or finds out by a name in the data what to run.
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "breakpoint", "input",
    "importlib.import_module", "runpy.run_path", "runpy.run_module", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "numpy.load", "np.load", "evaluate.load", "torch.hub.load", "torch.jit.load",
    "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
RUNNING_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "pty"}
# Of these, transformers loads classes that a checkpoint can name or bring along.
LOADED = ("Auto", "Llama")


def dotted(node):
    """``a.b.c`` of a name or an attribute of one; nothing for the result of a call."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source):
    """What in ``source`` could execute data, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{name}" for name in modules} | {node.module or ""}
            if {module.split(".")[0] for module in modules} & RUNNING_MODULES:
                found.append((node.lineno, "imports what unpickles"))
            if modules & RUNS_CODE:
                found.append((node.lineno, "imports what runs code, under a name of its own"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, danger) for danger in dangers_of_call(node)]
    return found


def dangers_of_call(node):
    name = dotted(node.func)
    said = {keyword.arg: keyword.value for keyword in node.keywords}

    def says(argument, value):
        given = said.get(argument)
        return isinstance(given, ast.Constant) and given.value is value

    if name in RUNS_CODE:
        yield f"calls {name}"
    if "shell" in said:
        yield "asks a shell"
    if name.startswith("subprocess.") and not is_command(node.args[:1]):
        yield "starts a program that data could name"
    if name.endswith("torch.load") and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    owner, _, method = name.rpartition(".")
    loads = method == "from_pretrained" and owner.split(".")[-1].startswith(LOADED)
    if loads and not says("trust_remote_code", False):
        yield "from_pretrained without trust_remote_code=False"
    if loads and ("Model" in owner or "ForCausalLM" in owner) and not says("use_safetensors", True):
        yield "weights without use_safetensors=True"
    if "trust_remote_code" in said and not says("trust_remote_code", False):
        yield "trusts remote code"


def is_command(arguments):
    """A list that begins with the name of a program, or with Python itself."""
    return any(
        isinstance(argument, ast.List)
        and (
            isinstance(argument.elts[0], ast.Constant)
            or dotted(argument.elts[0]) == "sys.executable"
        )
        for argument in arguments
    )


RECIPE = sorted((REPOSITORY / "recipe").rglob("*.py"))


@pytest.mark.parametrize("file", RECIPE, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_nothing_executes_code_from_data(file):
    asks = "calls input" if file.name == "chat.py" else None  # that is what it is for
    assert [found for found in dangers(file.read_text()) if found[1] != asks] == []


def test_the_loaders_that_are_looked_for_are_there():
    """A library that renames them would make the test above look at nothing."""
    loaded = {
        dotted(node.func)
        for file in RECIPE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained")
    }
    assert {"AutoConfig", "AutoTokenizer", "LlamaForCausalLM"} <= {
        name.split(".")[0] for name in loaded
    }


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "x = exec(text)",
        "import pickle",
        "from joblib import load",
        "from torch import load\nfrom numpy import load",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=safe)",
        "AutoConfig.from_pretrained(name)",
        "transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "LlamaForCausalLM.from_pretrained(name, use_safetensors=True)",
        "LlamaForCausalLM.from_pretrained(n, use_safetensors=False, trust_remote_code=False)",
        "load_dataset(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "anything.call(shell=True)",
        "subprocess.run(config['command'])",
        "importlib.import_module(config['class'])",
    ],
)
def test_each_danger_is_seen(line):
    assert dangers(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file, weights_only=True)",
        "LlamaForCausalLM.from_pretrained(n, use_safetensors=True, trust_remote_code=False)",
        "PeftModel.from_pretrained(base, folder)",
        "yaml.safe_load(text)",
        "subprocess.run(['git', 'status'], check=True)",
        "model.eval()",
        "re.compile(text)",
    ],
)
def test_what_is_harmless_passes(line):
    assert not dangers(line)
