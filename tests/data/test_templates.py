"""The prompt's bytes are pinned: an adapter answers well only to the prompt it was trained on."""

import pytest

from recipe.data.templates import (
    AlpacaTemplate,
    ChatTemplate,
    RawTemplate,
    Span,
    UnfitRowError,
    build_template,
)
from recipe.settings import UserError
from tests.data.conversations import one_turn, talk


def test_alpaca_without_input_byte_for_byte():
    spans = AlpacaTemplate(eos_token="</s>").spans(one_turn(0, "Name a fruit.", "", "Apple"))
    assert spans == [
        Span(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nName a fruit.\n\n### Response:\n",
            False,
        ),
        Span("Apple</s>", True),
    ]


def test_alpaca_with_input_byte_for_byte():
    prompt = AlpacaTemplate(eos_token="</s>").prompt("Give the plural.", "cat")
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGive the plural.\n\n### Input:\ncat\n\n### Response:\n"
    )


def test_braces_in_a_row_are_text():
    prompt = AlpacaTemplate(eos_token="</s>").prompt("Fill {input} and {0}", "{instruction}")
    assert "Fill {input} and {0}" in prompt
    assert "\n{instruction}\n" in prompt


def test_chat_template_trains_the_answer_and_its_eos(tokenizer):
    spans = ChatTemplate(tokenizer).spans(one_turn(0, "Give the plural.", "cat", "cats"))
    assert spans == [
        Span("<|user|>\nGive the plural.\n\ncat\n<|assistant|>\n", False),
        Span("cats</s>", True),
    ]


@pytest.mark.parametrize(
    ("chat_template", "output", "trained"),
    [
        # Llama-2-chat writes spaces around the answer.
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
            "Apple",
            " Apple </s>",
        ),
        # Llama-3 trims it.
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "Apple\n",
            "Apple</s>",
        ),
    ],
)
def test_white_space_that_a_chat_template_writes_or_trims(
    tokenizer, chat_template, output, trained
):
    kept, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        prompt, answer = ChatTemplate(tokenizer).spans(one_turn(0, "Name a fruit.", "", output))
    finally:
        tokenizer.chat_template = kept
    assert answer == Span(trained, True)
    assert prompt.text.endswith(("[/INST]", "<assistant>"))


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "what to train on is unknown"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "unknown"),
    ],
)
def test_chat_template_that_cannot_be_trained_is_refused(tokenizer, chat_template, message):
    kept = tokenizer.chat_template
    tokenizer.chat_template = chat_template
    try:
        with pytest.raises((UserError, UnfitRowError), match=message):
            build_template("chat", tokenizer).spans(one_turn(0, "Say it.", "", "It"))
    finally:
        tokenizer.chat_template = kept


def test_each_answer_of_a_conversation_is_trained_and_nothing_else(tokenizer):
    row = talk(0, "Name a fruit.", "Apple", "Another.", "Pear", system="Be short.")
    assert ChatTemplate(tokenizer).spans(row) == [
        Span("<|system|>\nBe short.\n<|user|>\nName a fruit.\n<|assistant|>\n", False),
        Span("Apple</s>", True),
        Span("\n<|user|>\nAnother.\n<|assistant|>\n", False),
        Span("Pear</s>", True),
    ]


def test_a_prompt_is_written_in_training_as_in_generation(tokenizer):
    template = ChatTemplate(tokenizer)
    prompt, _ = template.spans(one_turn(0, "Give the plural.", "cat", "cats"))
    assert prompt.text == template.prompt("Give the plural.", "cat")


def test_an_answer_that_stands_in_the_prompt_too(tokenizer):
    row = talk(0, "Say yes.", "yes", "Say yes again.", "yes")
    assert [span.text for span in ChatTemplate(tokenizer).spans(row) if span.trained] == [
        "yes</s>",
        "yes</s>",
    ]


def test_raw_text_is_left_alone():
    assert RawTemplate("</s>").spans(one_turn(0, "Q: 2+2\nA:", "", " 4")) == [
        Span("Q: 2+2\nA:", False),
        Span(" 4</s>", True),
    ]


@pytest.mark.parametrize("name", ["alpaca", "raw"])
def test_a_template_of_one_turn_refuses_a_conversation(tokenizer, name):
    for row in (talk(0, "a", "b", "c", "d"), talk(0, "a", "b", system="s")):
        with pytest.raises(UnfitRowError, match=r"data\.template: chat"):
            build_template(name, tokenizer).spans(row)


@pytest.fixture
def with_template(tokenizer):
    kept = tokenizer.chat_template

    def build(text):
        tokenizer.chat_template = text
        return build_template("chat", tokenizer)

    yield build
    tokenizer.chat_template = kept


def test_a_template_that_forgets_earlier_answers_is_refused(with_template):
    """As some templates drop the thinking of all but the last turn: no prefix is left."""
    template = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
        "…</s>{% else %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endif %}"
        "{% endfor %}"
    )
    template.spans(talk(0, "a", "b"))
    with pytest.raises(UnfitRowError, match=r"in this order \(turn 1\)"):
        template.spans(talk(0, "a", "b", "c", "d"))


def test_a_template_whose_prompts_forget_earlier_turns_is_refused(with_template):
    template = with_template(
        "{% if add_generation_prompt %}{{ messages[0].content }}{% else %}{% for m in messages %}"
        "{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% endif %}"
    )
    with pytest.raises(UnfitRowError, match=r"in this order \(turn 3\)"):
        template.spans(talk(0, "a", "b", "c", "b"))


@pytest.mark.parametrize("written", ["<think></think>{{ m.content }}", "{{ m.content }}<end>"])
def test_a_template_that_writes_into_the_answer_is_refused(with_template, written):
    """What it writes would be trained, and nobody said it."""
    template = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}" + written + "</s>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UnfitRowError, match="what to train on is unknown"):
        template.spans(talk(0, "a", "b"))


def test_a_template_that_refuses_a_row_says_why(with_template):
    template = with_template(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system turn') }}{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(UnfitRowError, match=r"refuses it \(no system turn\)"):
        template.spans(talk(0, "a", "b", system="s"))


@pytest.mark.parametrize("text", ["{% for", "{{ messages[9].content.x }}", "{{ 1 // 0 }}"])
def test_a_template_that_cannot_be_rendered_is_one_problem(with_template, text):
    with pytest.raises(UserError, match="chat template cannot be used"):
        with_template(text)


def test_a_template_writes_the_same_date_every_day(with_template):
    """Llama 3.2's template asks so; tomorrow's tokens would not be those that were trained."""
    template = with_template(
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} "
        "{{ messages[0].content }}"
    )
    assert template.prompt("Hello") == "26 Jul 2024 Hello"


@pytest.mark.parametrize(
    "user", ["{{ m.content[:3] }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"]
)
def test_a_template_that_leaves_text_out_is_refused(with_template, user):
    template = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}"
        + user
        + "{% endif %}{% endfor %}"
    )
    with pytest.raises(UnfitRowError, match=r"leaves out what the (system|user) says"):
        template.spans(talk(0, "a long question", "b", system="system words"))


@pytest.mark.parametrize(
    "date", ["{% set f = '%d' %}{{ strftime_now(f) }}", "{{ (strftime_now)('%d') }}"]
)
def test_a_date_that_cannot_be_fixed_is_refused(with_template, date):
    with pytest.raises(UserError, match="writes today's date"):
        with_template(date + "{{ messages[0].content }}")
