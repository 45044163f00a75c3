"""A prompt reaches the program byte for byte, however it is given to make."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROMPTS = [
    "What is the capital of France?",
    "It costs $5, or $$5, or ${HOME}.",
    "$(shell touch made-by-make) and $(touch made-by-shell)",
    "`touch made-by-backtick`",
    'He said "it\'s" twice; \'once\' and "again" \\ \\n',
    "first line\nsecond line\n\nlast",
    "# not a comment, 100% & | > made-by-redirect < * ? [a]",
    "--help",
    "¿Qué hora es? 日本語",
    "a=b := c",
]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Stands in for Python: writes the arguments that it gets."""
    program = tmp_path / "dump"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(tmp_path / 'arguments')!r}, 'w').write('\\0'.join(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("given", ["make infer PROMPT=…", "PROMPT=… make infer"])
def test_prompt_arrives_unchanged(tmp_path, dump, prompt, given):
    # A copy, so that what a prompt could run would leave its trace here and not in the tree.
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    # `make test ARGS=…` exports what it was given.
    made = ("MAKE", "MFLAGS", "ARGS", "ADAPTER", "STRATEGY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(made)}
    arguments = ["make", "infer", f"PY={dump}", "--assume-old=setup"]
    if given.startswith("make"):
        arguments.append(f"PROMPT={prompt}")
    else:
        environment["PROMPT"] = prompt
    before = {*tmp_path.iterdir(), tmp_path / "arguments"}
    result = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    received = (tmp_path / "arguments").read_text().split("\0")
    assert received == ["recipe/generate.py", f"--prompt={prompt}"]
    assert {*tmp_path.iterdir()} == before


def test_adapter_strategy_and_further_keys_arrive(tmp_path, dump):
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    arguments = ["make", f"PY={dump}", "--assume-old=setup", "STRATEGY=beam_search"]
    arguments += ["ADAPTER=runs/x", "ARGS=num_beams=3 --output a.jsonl"]
    for target, begin in (("infer", "--prompt=Hello"), ("chat", "--chat")):
        subprocess.run([*arguments, "PROMPT=Hello", target], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "arguments").read_text().split("\0") == [
            "recipe/generate.py",
            begin,
            "--adapter=runs/x",
            "strategy=beam_search",
            "num_beams=3",
            "--output",
            "a.jsonl",
        ]
