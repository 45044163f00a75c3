"""Whatever a data file holds, its reader answers with rows or with one line a problem."""

import copy
import io
import json

import pyarrow
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from pyarrow import parquet

from recipe.data.formats import FORMATS, Message
from recipe.data.rows import Row, Rows, read_rows
from recipe.data.templates import build_template
from recipe.data.tokens import tokenize_rows
from recipe.settings import DataSettings, UserError
from tests import hypothesis_profiles, junk  # noqa: F401
from tests.refusal import problems

RECORDS = {
    "alpaca": {"instruction": "Name a fruit.", "input": "", "output": "Apple"},
    "prompt_completion": {"prompt": "Name a fruit.", "completion": "Apple"},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Name a fruit."},
            {"role": "assistant", "content": "Apple"},
        ]
    },
    "sharegpt": {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "Name a fruit."},
            {"from": "gpt", "value": "Apple"},
        ],
    },
}


def parquet_bytes(columns: dict[str, pyarrow.Array]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def sound(suffix: str) -> list[bytes]:
    """Whole files of that kind."""
    if suffix == ".json":
        return [json.dumps([record] * 3).encode() for record in RECORDS.values()]
    if suffix == ".jsonl":
        return [json.dumps(record).encode() + b"\n" for record in RECORDS.values()]
    if suffix == ".csv":
        return [b'instruction,output\r\na,b\r\n"c\nd","e ""f"" g"\r\n', b"prompt,completion\na,b\n"]
    return [
        parquet_bytes({key: pyarrow.array([value] * 3) for key, value in record.items()})
        for record in RECORDS.values()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(folder, name: str, content: bytes, **settings) -> None:
    """The only two: rows whose texts can be tokenised, or problems of one line each."""
    file = folder / name
    file.write_bytes(content)
    try:
        rows = read_rows(DataSettings(path=str(file), **settings))
    except UserError as error:
        problems(error)
        event("refused")
        return
    event("read")
    assert isinstance(rows, Rows)
    assert rows.train
    assert all(column.isprintable() for column in rows.ignored_columns)
    for row in (*rows.train, *rows.held_out):
        assert row.messages[-1].role == "assistant"
        for message in row.messages:
            assert all(text == text.encode().decode() for text in message)


def files(suffix: str) -> st.SearchStrategy[bytes]:
    whole = st.sampled_from(sound(suffix))
    text = st.text(alphabet='[]{}:,"\\\n 1truefalsnu0eE.-\ufeff')
    return st.binary() | (st.text() | text).map(str.encode) | junk.damaged(whole) | whole


@given(content=files(".json"))
def test_json(folder, content):
    outcome(folder, "d.json", content)


@given(content=files(".jsonl"))
def test_jsonl(folder, content):
    outcome(folder, "d.jsonl", content)


@given(content=files(".csv"))
def test_csv(folder, content):
    outcome(folder, "d.csv", content)


@given(content=files(".parquet"))
def test_parquet(folder, content):
    outcome(folder, "d.parquet", content)


@st.composite
def records(draw: st.DrawFn, name: str) -> object:
    """A record of a format with junk in some of its places, or junk altogether."""
    record = copy.deepcopy(RECORDS[name])
    turns = record.get("messages", record.get("conversations", []))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from([record, *turns]))
        key = draw(st.sampled_from([*RECORDS[name], "role", "content", "from", "value"]))
        place[draw(st.just(key) | junk.texts)] = draw(junk.values | junk.texts)
    extra = draw(st.lists(junk.values, max_size=1))
    turns += extra
    return draw(st.sampled_from([record] * 4 + extra))


ranges = st.none() | st.sampled_from(["0:1", "1:", ":2", "0:3", "7:9"])


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_records(folder, name, data):
    found = data.draw(st.lists(records(name), min_size=1, max_size=4))
    asked = {"format": data.draw(st.sampled_from([None, name])), "rows": data.draw(ranges)}
    # json writes NaN, infinities and halves of surrogate pairs, and reads them.
    outcome(folder, "d.json", json.dumps(found).encode(), **asked)
    lines = "".join(json.dumps(record) + "\n" for record in found)
    outcome(folder, "d.jsonl", lines.encode(), **asked, held_out=data.draw(ranges))


@given(header=st.permutations(["instruction", "output", "x"]), data=st.data())
def test_sheets(folder, header, data):
    cell = junk.texts.map(lambda text: text.replace('"', '""'))
    header += data.draw(st.lists(cell, max_size=1))
    line = st.lists(cell, min_size=len(header), max_size=len(header)) | st.lists(cell, max_size=5)
    rows = [header, *data.draw(st.lists(line, min_size=1, max_size=4))]
    quote = data.draw(st.sampled_from(['"', ""]))
    text = "".join(",".join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in rows)
    outcome(folder, "d.csv", text.encode(errors="surrogatepass"))


ARROW = {
    "text": (pyarrow.string(), st.text(max_size=8)),
    "large": (pyarrow.large_string(), st.text(max_size=8)),
    "bytes": (pyarrow.binary(), st.binary(max_size=8)),
    "whole": (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)),
    "float": (pyarrow.float64(), st.floats()),
    "half": (pyarrow.float16(), st.floats(width=16)),
    "boolean": (pyarrow.bool_(), st.booleans()),
    "nothing": (pyarrow.null(), st.none()),
    "date": (pyarrow.date32(), st.integers(-(2**31), 2**31 - 1)),
    "moment": (pyarrow.timestamp("us"), st.integers(-(2**63), 2**63 - 1)),
    "moment, ns": (pyarrow.timestamp("ns"), st.integers(-(2**63), 2**63 - 1)),
    "moment somewhere": (pyarrow.timestamp("s", tz="Mars/Base"), st.integers(0, 2**40)),
    "duration": (pyarrow.duration("s"), st.integers(-(2**63), 2**63 - 1)),
    "time": (pyarrow.time64("us"), st.times()),
    "decimal": (pyarrow.decimal128(9, 2), st.decimals(-1000, 1000, places=2)),
    "list": (pyarrow.list_(pyarrow.string()), st.lists(st.text(max_size=4), max_size=3)),
    "map": (
        pyarrow.map_(pyarrow.string(), pyarrow.string()),
        st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), max_size=3),
    ),
    "turns": (
        pyarrow.list_(
            pyarrow.struct(
                [(key, pyarrow.string()) for key in ("role", "content", "from", "value")]
            )
        ),
        st.sampled_from(
            [record.get("messages", record.get("conversations", [])) for record in RECORDS.values()]
        )
        | st.lists(st.none() | st.dictionaries(st.just("role"), st.text(max_size=4)), max_size=3),
    ),
}
FITTING = {"messages": "turns", "conversations": "turns"}


@given(
    names=st.sampled_from([tuple(record) for record in RECORDS.values()]),
    more=st.lists(st.text(max_size=4), max_size=1),
    count=st.integers(0, 3),
    data=st.data(),
)
def test_parquet_columns(folder, names, more, count, data):
    arrays = []
    for name in (*names, *more):
        fitting = FITTING.get(name, "text")
        kind, strategy = ARROW[data.draw(st.sampled_from([fitting] * len(ARROW) + list(ARROW)))]
        cells = st.lists(strategy | st.none(), min_size=count, max_size=count)
        array = pyarrow.array(data.draw(cells), kind)
        plain = pyarrow.types.is_string(kind) and data.draw(st.booleans())
        arrays.append(array.dictionary_encode() if plain else array)
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, names=[*names, *more]), file)
    outcome(folder, "d.parquet", file.getvalue())


PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = [
    PLAIN,
    "{{ bos_token }}" + PLAIN,
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no ' + m['content']) }}"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "{{ strftime_now('%d %b %Y') }}" + PLAIN,
    "{{ messages | map(attribute='content') | join(eos_token) }}",
    "{{ messages[-1]['content'] }}{{ eos_token }}",
]
PIECES = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}",
    "{% if m['role'] == 'assistant' %}",
    "{% else %}",
    "{% endif %}",
    "{{ m['content'] }}",
    "{{ m['content'] | trim | upper }}",
    "{{ m.role }}",
    "{{ eos_token }}",
    "{{ bos_token }}",
    "{{ messages[0]['content'][0] + 1 }}",
    "{{ raise_exception('a\u2028b') }}",
    "{{ nothing.at.all }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{%- set x = 1 // 0 -%}",
    "{% generation %}",
    "\n",
    "a",
]
programs = st.sampled_from(TEMPLATES) | st.lists(st.sampled_from(PIECES)).map("".join) | st.text()
SAID = ["</s>", "<s>", "<|user|>", "<|assistant|>\n", "### Response:\n", "{x}", "{{ 1 }}", "\n"]
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
said = (
    st.text(LETTERS, min_size=1)
    | st.lists(LETTERS | st.sampled_from(SAID), min_size=1).map("".join)
    | st.just("Apple")
).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, most: int = 3) -> Row:
    turns = [Message("system", draw(said))] if most > 1 and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most))):
        context = draw(st.just("") | said)
        turns += [Message("user", draw(said), context), Message("assistant", draw(said))]
    return Row(draw(st.integers(0, 9)), tuple(turns))


@pytest.fixture(scope="module")
def own_tokenizer(tokenizer):
    """A copy, because its chat template changes."""
    return copy.deepcopy(tokenizer)


def tokenised(rows, name, tokenizer) -> None:
    """Rows that are trained up to and with an EOS behind each answer, or problems of a line."""
    try:
        template = build_template(name, tokenizer)
        found = tokenize_rows(rows, template, tokenizer, source="d.json")
    except UserError as error:
        problems(error)
        event("refused")
        return
    event("tokenised")
    for row, tokens in zip(rows, found, strict=True):
        answers = [m.content.strip() for m in row.messages if m.role == "assistant"]
        ends = tokens.input_ids[tokens.trained] == tokenizer.eos_token_id
        assert ends.sum() == len(answers)
        text = tokenizer.decode(tokens.input_ids[tokens.trained])
        assert all(answer in text for answer in answers)


@given(rows=st.lists(conversations(), min_size=1, max_size=3), program=programs)
def test_chat_templates(own_tokenizer, rows, program):
    own_tokenizer.chat_template = program
    tokenised(rows, "chat", own_tokenizer)


@given(
    rows=st.lists(conversations(most=1), min_size=1, max_size=3) | st.lists(conversations()),
    name=st.sampled_from(["alpaca", "raw"]),
)
def test_plain_templates(own_tokenizer, rows, name):
    tokenised(rows, name, own_tokenizer)
