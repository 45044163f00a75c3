"""Made-up reports of a comparison, in the form of ``report.json``."""

from typing import Any

HOSTILE = {
    "script": "<script>window.ran = 1; alert(1)</script>",
    "closes all": '--></script></style></title></textarea></svg></math><script>alert("x")</script>',
    "attribute": "\"><img src=x onerror=alert(1)> '><svg onload=alert(1)> `onclick=alert(1)",
    "entity": "&lt;b&gt; &amp;amp; &#60;script&#62; &nbsp",
    "link": "javascript:alert(1) https://example.org/a.png <a href='http://example.org'>x</a>",
    "style": "<style>*{display:none}</style> url(https://example.org/x) <link rel=stylesheet>",
    "bidi": "user\u202e\u2066// admin\u2069\u202c \u200f\u061c end",
    "zero width": "pass\u200bword\u200d \ufeff\u2060\u00ad\u034f\U000e0041 end",
    "controls": "a\x00b\x08c\x1b[31m\x7f\x85 d\r\ne\x0c\u2028\u2029 end",
    "surrogate": "half \ud83d of a letter, and \udcff",
    "markdown": "# title\n**bold** [x](http://example.org) ![y](z.png)\n```html\n<b>\n```",
    "one word": "Donaudampfschifffahrt" * 500,
    "lines": "\n\n first lines are empty\n\tand the last\n\n",
    "long": "word <i>and</i> word " * 5000,
    "arabic": "مرحبا بالعالم <b>hello</b> 123",
}


def answer(text: str, *, finish_reason: str = "eos", rougeL: float = 0.5, **rest: Any) -> Any:
    return {
        "text": text,
        "finish_reason": finish_reason,
        "tokens": len(text.split()),
        "rougeL": rougeL,
        "copied": None,
        **rest,
    }


ANSWERS = [
    {
        "part": "seen",
        "index": 3,
        "prompt": "Name the colour of the sky.",
        "reference": "Blue.",
        "base": answer("The sky is often blue.", rougeL=0.33),
        "tuned": answer("Blue.", rougeL=1.0, copied={"index": 7, "share": 0.94}),
    },
    {
        "part": "seen",
        "index": 5,
        "prompt": "Count to three.",
        "reference": "One, two, three.",
        "base": answer("One, two, three.", rougeL=1.0),
        "tuned": answer("One, two, three.", rougeL=1.0),
    },
    {
        "part": "unseen",
        "index": 312,
        "prompt": "Write the date.\n4 May 2019",
        "reference": "2019-05-04",
        "base": answer("May May May May", finish_reason="length", rougeL=0.0),
        "tuned": answer("", finish_reason="stop", rougeL=0.0),
    },
]


def _figure(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _figures(perplexity: float, rouge: float) -> dict[str, Any]:
    return {
        "perplexity": _figure(perplexity, perplexity * 0.9, perplexity * 1.1),
        "rouge1": _figure(rouge, rouge - 0.1, rouge + 0.1),
        "rouge2": _figure(rouge / 2, rouge / 2 - 0.1, rouge / 2 + 0.1),
        "rougeL": _figure(rouge, rouge - 0.1, rouge + 0.1),
        "exact_answer": _figure(0.125, 0.05, 0.2),
        "near_copy": _figure(0.5, 0.4, 0.6),
        "stop_rate": _figure(1.0, 1.0, 1.0),
        "mean_tokens": _figure(11.25, 9.0, 13.0),
        "repetition": {"value": None, "low": None, "high": None},
    }


def _part(rows: int, base: float, tuned: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "tokens": rows * 12,
        "base": _figures(base, 0.25),
        "tuned": _figures(tuned, 0.625),
        "difference": {
            "nll": _figure(-1.081, -1.2, -0.96) | {"p": 0.0004},
            "rougeL": _figure(0.375, -0.01, 0.76) | {"p": 0.0521},
        },
    }


def _epoch(epoch: int, name: str, seen: float, unseen: float, neutral: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 39 * epoch,
        "name": name,
        "seen": seen,
        "unseen": unseen,
        "neutral": neutral,
    }


def report(**changes: Any) -> dict[str, Any]:
    """A whole report with three answers; ``changes`` replace its parts."""
    neutral = {
        "rows": 4,
        "tokens": 1996,
        "base": {"perplexity": _figure(22.0, 20.0, 24.0)},
        "tuned": {"perplexity": _figure(23.5, 21.0, 26.0)},
        "difference": {"nll": _figure(0.066, 0.05, 0.08) | {"p": 0.031}},
    }
    return {
        "run": "runs/starter-001",
        "date": "2026-11-26T09:00:00+00:00",
        "device": "CPU, 2 threads",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "commands": ["recipe/compare.py --run runs/starter-001"],
        "verdict": {
            "label": "learned",
            "summary": "Answers that it never saw became likelier.",
            "evidence": ["held-out rows: -1.081 nats a token", "neutral text: +0.066"],
            "notes": ["Neutral text became less likely too."],
        },
        "parts": {
            "seen": _part(100, 17.9, 3.1),
            "unseen": _part(90, 18.4, 6.25),
            "neutral": neutral,
        },
        "epochs": [
            _epoch(0, "base", 17.9, 18.4, 22.0),
            _epoch(1, "checkpoint-39", 6.0, 6.2, 22.4),
            _epoch(2, "adapter", 3.1, 6.9, 23.5),
        ],
        "turned": 1,
        "loss": [
            {"step": step, "epoch": step / 39, "loss": 3.0 - step / 50} for step in range(1, 79)
        ],
        "answers": ANSWERS,
        "generation": "greedy_search, max_new_tokens=128",
        "settings": "name: starter\nlora:\n  r: 16\n",
        "manifest": {"base": "models/smollm2", "device": "CPU", "dtypes": {"base": "float32"}},
        **changes,
    }


def filled(text: str) -> dict[str, Any]:
    """A report that has ``text`` wherever a report has text of others; only ``part`` is known."""
    shape = report()
    one = {"finish_reason": text, "text": text}
    two = {"finish_reason": text, "text": f"{text} and {text}"}
    shape["answers"] = [
        {
            "part": part,
            "index": 4,
            "prompt": text,
            "reference": text,
            "base": answer("") | one,
            "tuned": answer("") | two,
        }
        for part in ("seen", "unseen")
    ]
    for entry in shape["epochs"]:
        entry["name"] = text
    return shape | {
        "run": text,
        "date": text,
        "device": text,
        "versions": {text: text},
        "commands": [text, text],
        "verdict": {"label": text, "summary": text, "evidence": [text], "notes": [text]},
        "generation": text,
        "settings": text,
        "manifest": {"base": text, text: [text]},
    }
