"""Does what this recipe claims hold for your config, checkpoint and rows, on this machine?

    python recipe/prove.py --config starter.yaml
    python recipe/prove.py --config lora_alpaca.yaml model.name_or_path=models/mine data.rows=0:2000

    make prove CONFIG=starter.yaml ARGS="lora.use_dora=true"

Real runs on the first rows, in a temporary folder, against stock transformers and peft: a line for
each claim with the measured number, its tolerance and pass or FAIL. All of it is kept as JSON, in a
fresh runs/prove-<config>-001.json unless --json names a file. Exit code 3 if a claim fails.
"""

import argparse
import gc
import sys

from recipe.exit_codes import run_command
from recipe.settings import UserError, file_objection, load_settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a name in configs/")
    parser.add_argument("--json", metavar="FILE", help="must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(arguments)
    if args.json is not None and (objection := file_objection(args.json)):
        raise UserError.single("--json", objection)
    settings = load_settings(args.config, args.overrides)
    # Only now: these imports take seconds, and a mistake in the config is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.proving.report import prove

    # What the imports made stays; the collections of many runs need not walk through it.
    gc.collect()
    gc.freeze()
    prove(settings, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
