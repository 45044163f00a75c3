"""A YAML file becomes an adapter.

    accelerate launch recipe/train.py --config lora_alpaca.yaml
    python recipe/train.py --config starter.yaml training.num_train_epochs=1 lora.r=8

    python recipe/train.py --config starter.yaml --show-data 5
    python recipe/train.py --config starter.yaml --check

Overrides are section.key=value, the value written as in YAML. The run's folder is a fresh
runs/<config>-001, -002…; its settings.yaml given to --config repeats the run beside it, and goes on
with it when training.resume_from_checkpoint names the run.
"""

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from recipe.exit_codes import run_command
from recipe.settings import Stopped, UserError, generation_settings, load_settings


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    stops = parser.add_mutually_exclusive_group()
    stops.add_argument(
        "--show-data",
        type=int,
        metavar="N",
        help="print the first N rows token by token, and what max_length would cut, then stop",
    )
    stops.add_argument(
        "--check", action="store_true", help="do everything up to the first step, then stop"
    )
    parser.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="do not try the longest micro-batch, a save and a generation before step 1",
    )
    parser.add_argument(
        "--allow-changed",
        action="store_true",
        help="with training.resume_from_checkpoint: go on with other settings or rows",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.show_data is not None and args.show_data < 1:
        raise UserError.single("--show-data", f"{args.show_data} is below 1. Ask for 1 or more.")
    return args


def main(arguments: list[str] | None = None) -> None:
    try:
        _main(arguments)
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, Stopped):
            raise
        from recipe.training.meeting import explained

        raise explained(error) from error


@contextmanager
def everything_stays() -> Iterator[None]:
    """Collect nothing of what is made in here, as imports are, now or later: much of their time
    goes into looking through it again and again, and each collection of the Trainer's would too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _main(arguments: list[str] | None) -> None:
    args = _parsed(arguments)
    settings = load_settings(args.config, args.overrides)
    # Only now: these imports take seconds, and a mistake in the config is told before them.
    with everything_stays():
        from recipe.quiet import quiet_libraries

        quiet_libraries()
    if args.show_data:
        from recipe.run_data import show_data

        show_data(settings, args.show_data)
        return
    with everything_stays():
        from recipe.data.cache import recipe_cache
        from recipe.finetune import check, finetune
        from recipe.memory.watch import MemoryWatch
        from recipe.rehearsal import rehearse
        from recipe.training.signals import follow_launcher

    follow_launcher()
    main_process = os.environ.get("RANK", "0") == "0"
    publishes = settings.hub.push and main_process
    if publishes:
        from recipe.publish import check_hub, publish_run

        check_hub(settings.hub, settings.model)
    if args.check:
        check(settings)
        return
    memory = None if args.no_rehearsal else MemoryWatch()
    run = finetune(
        settings,
        rehearse=partial(rehearse, memory=memory, known=recipe_cache() / "rehearsed")
        if memory
        else None,
        memory=memory,
        allow_changed=args.allow_changed,
    )
    if publishes:
        publish_run(run, settings.hub)
    if settings.judging.report and main_process:
        from recipe.comparison import Asked, compare_at_end
        from recipe.training.engine import asked_engine
        from recipe.training.run_log import say

        rows, tokens = settings.judging.rows, settings.judging.max_new_tokens
        command = f"python recipe/compare.py --rows {rows} max_new_tokens={tokens} --run".split()
        generation = generation_settings({"max_new_tokens": tokens})
        if asked_engine().shards:  # the base was cut because one process may not hold it
            say(f"compare   {shlex.join([*command, str(run)])}  writes the report, in one process")
            return
        compare_at_end(run, Asked(rows, generation, command=[*command, str(run)]))


if __name__ == "__main__":
    sys.exit(run_command(main))
