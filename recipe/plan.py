"""Will it fit, how long does it take, and what is the cheapest change that would make it fit?

    python recipe/plan.py --config lora_alpaca.yaml
    python recipe/plan.py --config lora_alpaca.yaml --card "RTX 4090 24GB"
    python recipe/plan.py --config lora_alpaca.yaml --card 16 training.per_device_train_batch_size=2
    python recipe/plan.py --config lora_alpaca.yaml --processes 8 --strategy fsdp2

Neither weights nor a network are needed. The shape is that of a local folder, of the hub's cache,
or a published one; rows are counted where tokenizer and file are here, and else assumed.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from recipe.exit_codes import run_command
from recipe.settings import Settings, UserError, file_objection, load_settings


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a name in configs/")
    parser.add_argument("--card", help='a card such as "A100 40GB", or GiB such as 24')
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="default: cuda, unless training.use_cpu is set, or no card is named or here and the "
        "config needs none",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share the work")
    parser.add_argument("--strategy", choices=["ddp", "fsdp2", "zero2", "zero3"], default="ddp")
    parser.add_argument("--json", metavar="FILE", help="must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.processes < 1:
        raise UserError.single("--processes", f"{args.processes} is below 1. Ask for 1 or more.")
    if args.json is not None and (objection := file_objection(args.json)):
        raise UserError.single("--json", objection)
    if args.card and args.device == "cpu":
        raise UserError.single("--card", "is no CPU. Leave out one of --card and --device cpu.")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = _parsed(arguments)
    settings = load_settings(args.config, args.overrides)
    # Only now: these imports take seconds, and a mistake in the config is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.planning import report
    from recipe.workload import workload

    if args.card and settings.training.get("use_cpu"):
        raise UserError.single("--card", "is no CPU, and training.use_cpu is set. Leave one out.")
    room, name = _room(args.card)
    asked = workload(settings, device=_device(args, settings))
    lines, content = report(
        asked, room=room, name=name, processes=args.processes, strategy=args.strategy
    )
    print("\n".join([f"plan      {settings.name}", *lines]))
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def _room(card: str | None) -> tuple[int | None, str]:
    """Bytes of the card that is named, and its name."""
    from recipe.memory.cards import CARDS, card_named

    if card is None:
        return None, ""
    if re.fullmatch(r"\d{1,6}(\.\d+)?", card) and float(card) > 0:
        return round(float(card) * 2**30), f"{card} GiB"
    found = card_named(card)
    if found is None:
        listed = ", ".join(one.name for one in CARDS)
        raise UserError.single("--card", f"{card!r} is not known. Give GiB, or one of {listed}.")
    return found.memory, found.name


def _device(args: argparse.Namespace, settings: Settings) -> str:
    import torch

    training = settings.training
    if args.device:
        return str(args.device)
    if training.get("use_cpu"):
        return "cpu"
    needs_card = training.get("fp16") or training.get("bf16") or settings.model.quantization
    wanted = args.card or needs_card or args.processes > 1 or torch.cuda.is_available()
    return "cuda" if wanted else "cpu"


if __name__ == "__main__":
    sys.exit(run_command(main))
