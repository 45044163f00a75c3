"""A YAML file becomes an adapter.

    accelerate launch recipe/train.py --config lora_alpaca.yaml
    python recipe/train.py --config starter.yaml training.num_train_epochs=1 lora.r=8

Overrides are section.key=value, the value written as in YAML. The run's folder is a fresh
runs/<config>-001, -002…; its settings.yaml given to --config repeats the run beside it.
"""

import argparse
import sys

from recipe.exit_codes import run_command
from recipe.settings import load_settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(arguments)
    settings = load_settings(args.config, args.overrides)
    # Only now: these imports take seconds, and a mistake in the config is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.finetune import finetune

    finetune(settings)


if __name__ == "__main__":
    sys.exit(run_command(main))
