"""What docs/lm-eval/starter_held_out.yaml needs: which rows, and the prompt as in training."""

from typing import Any

HEAD = "Below is an instruction that describes a task"
END = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


def held_out(rows: Any) -> Any:
    """``data.held_out`` of configs/starter.yaml, of which those with one right answer."""
    return rows.select(range(310, 400)).filter(lambda row: row["checkable"] == "yes")


def prompt(row: dict[str, str]) -> str:
    """The Alpaca template, with and without input."""
    if row["input"]:
        return (
            f"{HEAD}, paired with an input that provides further context. {END}"
            f"{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
        )
    return f"{HEAD}. {END}{row['instruction']}\n\n### Response:\n"
