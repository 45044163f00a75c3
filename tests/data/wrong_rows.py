"""Rows with one mistake each in a file that can be read, and what is said."""

from typing import Any

from tests.data.wrong_files import CSV, JSON, JSON_LINES, PARQUET, PATHS, ROW, Wrong, lines, rows

USER = {"role": "user", "content": "Name a fruit."}
ASSISTANT = {"role": "assistant", "content": "Apple"}
SYSTEM = {"role": "system", "content": "Be short."}
HUMAN = {"from": "human", "value": "Name a fruit."}
GPT = {"from": "gpt", "value": "Apple"}


def chat(*turns: Any) -> bytes:
    return lines({"messages": [USER, ASSISTANT]}, {"messages": list(turns)})


def sharegpt(*turns: Any, **more: Any) -> bytes:
    return lines({"conversations": [HUMAN, GPT]}, {"conversations": list(turns), **more})


FIELDS = {
    "null": ({**ROW, "output": None}, "output", ("expected text", "nothing (null or absent)")),
    "absent": ({"instruction": "a"}, "output", ("expected text", "nothing (null or absent)")),
    "number": ({**ROW, "output": 7}, "output", ("expected text", "found a number", "Correct or")),
    "NaN": ({**ROW, "output": float("nan")}, "output", ("expected text", "found a number")),
    "boolean": ({**ROW, "output": True}, "output", ("expected text", "found a boolean")),
    "list": ({**ROW, "output": ["b"]}, "output", ("expected text", "found a list")),
    "object": ({**ROW, "output": {"a": 1}}, "output", ("expected text", "found an object")),
    "empty": ({**ROW, "instruction": ""}, "instruction", ("expected text", "nothing in it")),
    "blank": ({**ROW, "instruction": " \n"}, "instruction", ("expected text", "nothing in it")),
    "input": ({**ROW, "input": 3}, "input", ("expected text", "found a number", "remove the row")),
    "NUL": ({**ROW, "output": "a\0"}, "output", ("found a NUL character at 1", "Correct or")),
    "surrogate": ({**ROW, "output": "\ud800"}, "output", ("half of a surrogate pair (U+D800)",)),
    "EOS inside": ({**ROW, "output": "a</s>b"}, "", ("its response contains '</s>'", "Remove it")),
}
ROWS = {
    **{
        f"field: {name}": Wrong(
            "d.jsonl", lines(ROW, record), f"d.jsonl: row 1{f': {field}' if field else ''}", said
        )
        for name, (record, field, said) in FIELDS.items()
    },
    "key twice": Wrong(
        "d.jsonl",
        lines(ROW) + b'{"instruction": "a", "output": "b", "output": "c"}\n',
        "d.jsonl: row 1: output",
        ("stands twice in the row", "Correct or remove the row."),
    ),
    "two fields of one row": Wrong(
        "d.jsonl",
        lines({"instruction": 1, "output": 2}),
        "d.jsonl: row 0: instruction",
        (),
        problems=2,
    ),
    "25 broken rows": Wrong(
        "d.jsonl", lines(*[{**ROW, "output": 5}] * 25), "d.jsonl: row 0: output", (), problems=11
    ),
    "other columns": Wrong(
        "d.json",
        rows({"question": "a", "answer": "b"}),
        "d.json",
        ("columns answer, question found", "instruction, output", "Rename them."),
    ),
    "line end in a column": Wrong(
        "d.json", rows({"a\nb\u2028": 1}), "d.json", ("columns", "found", "Rename them.")
    ),
    "columns of two formats": Wrong(
        "d.json",
        rows({**ROW, "prompt": "a", "completion": "b"}),
        "d.json",
        ("fit the formats alpaca and prompt_completion", "Say which in data.format."),
    ),
    "another format asked for": Wrong(
        "d.json",
        rows(ROW),
        "d.json",
        ("the messages format needs messages", "or correct data.format."),
        data={"format": "messages"},
    ),
    "outputs all empty": Wrong(
        "d.json",
        rows({**ROW, "output": ""}, {**ROW, "output": " "}),
        "data.path",
        ("every row of d.json has an empty output", "nothing would be trained", "Correct the rows"),
    ),
    "rows past the end": Wrong(
        "d.json", rows(ROW, ROW), "data.rows", ("0:3", "holds 2 rows (0:2)"), data={"rows": "0:3"}
    ),
    "rows from behind the end": Wrong(
        "d.json", rows(ROW), "data.rows", ("asks for 5:", "holds 1 rows (0:1)"), data={"rows": "5:"}
    ),
    "held out past the end": Wrong(
        "d.json",
        rows(ROW, ROW),
        "data.held_out",
        ("1:9", "holds 2 rows (0:2)", "Name rows that are there"),
        data={"rows": "0:1", "held_out": "1:9"},
    ),
    "held-out rows trained on": Wrong(
        "d.json",
        rows(ROW, ROW, ROW),
        "data.held_out",
        ("all 2 rows", "training rows too", "Hold out other rows."),
        data={"rows": "0:1", "held_out": "1:3"},
    ),
    "held-out rows without an answer": Wrong(
        "d.jsonl",
        lines(ROW, {**ROW, "output": " "}, {**ROW, "output": ""}),
        "data.held_out",
        ("every row has an empty output", "Hold out others."),
        data={"rows": "0:1", "held_out": "1:3"},
    ),
    "held-out row broken": Wrong(
        "d.json",
        rows(ROW, {**ROW, "output": 1}),
        "d.json: row 1: output",
        ("found a number",),
        data={"rows": "0:1", "held_out": "1:2"},
    ),
}
CHAT = {
    "unknown role": Wrong(
        "d.jsonl",
        chat(USER, {"role": "tool", "content": ""}, ASSISTANT),
        "d.jsonl: row 1: messages[1].role",
        ("expected one of system, user, assistant", "found 'tool'", "Correct or remove the row."),
    ),
    "line end in a role": Wrong(
        "d.jsonl",
        chat({"role": "a\nb", "content": "c"}),
        "d.jsonl: row 1: messages[0].role",
        ("a\\nb",),
    ),
    "no role": Wrong(
        "d.jsonl",
        chat({"content": "a"}, ASSISTANT),
        "d.jsonl: row 1: messages[0].role",
        ("nothing",),
    ),
    "role of a number": Wrong(
        "d.jsonl",
        chat(USER, {"role": 1, "content": "a"}),
        "d.jsonl: row 1: messages[1].role",
        ("expected one of", "found a number"),
    ),
    "two user turns": Wrong(
        "d.jsonl",
        chat(USER, USER, ASSISTANT),
        "d.jsonl: row 1: messages[1]",
        ("expected the assistant's turn", "found the user's"),
    ),
    "two user turns behind a system turn": Wrong(
        "d.jsonl", chat(SYSTEM, USER, USER), "d.jsonl: row 1: messages[2]", ("found the user's",)
    ),
    "the user last": Wrong(
        "d.jsonl",
        chat(USER, ASSISTANT, USER),
        "d.jsonl: row 1: messages",
        ("no assistant turn at its end to train on", "Correct or remove the row."),
    ),
    "the assistant first": Wrong(
        "d.jsonl", chat(ASSISTANT), "d.jsonl: row 1: messages[0]", ("expected the user's turn",)
    ),
    "system in the middle": Wrong(
        "d.jsonl",
        chat(USER, ASSISTANT, SYSTEM, USER, ASSISTANT),
        "d.jsonl: row 1: messages[2]",
        ("expected the user's turn", "found the system's"),
    ),
    "only a system turn": Wrong(
        "d.jsonl", chat(SYSTEM), "d.jsonl: row 1: messages", ("no assistant turn",)
    ),
    "no turns": Wrong(
        "d.jsonl", chat(), "d.jsonl: row 1: messages", ("expected a list of turns", "an empty list")
    ),
    "turns are text": Wrong(
        "d.jsonl",
        chat("Name a fruit.", "Apple"),
        "d.jsonl: row 1: messages[0]",
        ("expected an object", "found text"),
        problems=2,
    ),
    "messages are an object": Wrong(
        "d.jsonl",
        lines({"messages": USER}),
        "d.jsonl: row 0: messages",
        ("expected a list of turns", "found an object", "Correct or remove the row."),
    ),
    "messages are null": Wrong(
        "d.jsonl", lines({"messages": None}), "d.jsonl: row 0: messages", ("found nothing",)
    ),
    "content null": Wrong(
        "d.jsonl",
        chat(USER, {"role": "assistant", "content": None}),
        "d.jsonl: row 1: messages[1].content",
        ("expected text", "found nothing"),
    ),
    "content in parts": Wrong(
        "d.jsonl",
        chat({"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT),
        "d.jsonl: row 1: messages[0].content",
        ("expected text", "found a list"),
    ),
    "user says nothing": Wrong(
        "d.jsonl",
        chat({"role": "user", "content": " "}, ASSISTANT),
        "d.jsonl: row 1: messages[0].content",
        ("expected text", "found nothing in it"),
    ),
    "key of a turn twice": Wrong(
        "d.jsonl",
        b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "d.jsonl: row 0: messages[0].role",
        ("stands twice in the turn",),
    ),
    "answers all empty": Wrong(
        "d.jsonl",
        lines({"messages": [USER, {"role": "assistant", "content": ""}]}),
        "data.path",
        ("every row of d.jsonl has an empty answer",),
    ),
    "ShareGPT: unknown role": Wrong(
        "d.jsonl",
        sharegpt(HUMAN, {"from": "function_call", "value": "a"}),
        "d.jsonl: row 1: conversations[1].from",
        ("expected one of system, human, user, gpt, assistant", "found 'function_call'"),
    ),
    "ShareGPT: no value": Wrong(
        "d.jsonl",
        sharegpt(HUMAN, {"from": "gpt", "content": "a"}),
        "d.jsonl: row 1: conversations[1].value",
        ("expected text", "found nothing"),
    ),
    "ShareGPT: the human last": Wrong(
        "d.jsonl", sharegpt(HUMAN), "d.jsonl: row 1: conversations", ("no assistant turn",)
    ),
    "ShareGPT: two answers": Wrong(
        "d.jsonl",
        sharegpt(HUMAN, GPT, GPT),
        "d.jsonl: row 1: conversations[2]",
        ("expected the user's turn", "found the assistant's"),
    ),
    "ShareGPT: system of a number": Wrong(
        "d.jsonl", sharegpt(HUMAN, GPT, system=3), "d.jsonl: row 1: system", ("found a number",)
    ),
    "ShareGPT: system twice": Wrong(
        "d.jsonl",
        sharegpt({"from": "system", "value": "a"}, HUMAN, GPT, system="b"),
        "d.jsonl: row 1: system",
        ("conversations[0] is a system turn too", "Correct or remove the row."),
    ),
    "prompt null": Wrong(
        "d.jsonl",
        lines({"prompt": None, "completion": "a"}),
        "d.jsonl: row 0: prompt",
        ("expected text", "found nothing"),
    ),
    "completion of turns": Wrong(
        "d.jsonl",
        lines({"prompt": "a", "completion": [ASSISTANT]}),
        "d.jsonl: row 0: completion",
        ("expected text", "found a list"),
    ),
    "completions all empty": Wrong(
        "d.jsonl", lines({"prompt": "a", "completion": ""}), "data.path", ("an empty completion",)
    ),
}
TEMPLATES = {
    "alpaca for a long conversation": Wrong(
        "d.jsonl",
        lines({"messages": [USER, ASSISTANT, USER, ASSISTANT]}),
        "d.jsonl: row 0",
        ("has the turns user, assistant, user, assistant", "Use data.template: chat, with"),
        data={"template": "alpaca"},
    ),
    "raw for a system turn": Wrong(
        "d.jsonl",
        lines({"messages": [SYSTEM, USER, ASSISTANT]}),
        "d.jsonl: row 0",
        (
            "has the turns system, user, assistant",
            "the raw template",
            "Use data.template: chat, with",
        ),
        data={"template": "raw"},
    ),
}
# Known only once rows are tokenised, and their ids are kept: the next try needs them again.
LENGTHS = {
    "no row fits": Wrong(
        "d.jsonl",
        lines(ROW),
        "data.max_length",
        ("no training row fits into 8 tokens", "Raise it"),
        data={"max_length": 8, "too_long": "drop"},
    ),
    "rows too long": Wrong(
        "d.jsonl",
        lines(ROW, {**ROW, "output": "a b " * 200}),
        "data.max_length",
        ("1 of 2 training rows", "longer than 256 tokens: 1", "data.too_long"),
    ),
    "longer than the model's context": Wrong(
        "d.jsonl",
        lines(ROW),
        "data.max_length",
        ("257 is beyond this model's context of 256", "Lower it."),
        data={"max_length": 257},
    ),
}
CASES = {
    f"{group}, {name}": case
    for group, cases in (
        ("json", JSON),
        ("jsonl", JSON_LINES),
        ("rows", ROWS),
        ("csv", CSV),
        ("parquet", PARQUET),
        ("chat", CHAT),
        ("template", TEMPLATES),
        ("length", LENGTHS),
        ("path", PATHS),
    )
    for name, case in cases.items()
}
