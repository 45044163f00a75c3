"""The prompt's bytes are pinned: an adapter answers well only to the prompt it was trained on."""

import pytest

from recipe.data.rows import Row
from recipe.data.templates import AlpacaTemplate, ChatTemplate, Span, build_template
from recipe.settings import UserError


def test_alpaca_without_input_byte_for_byte():
    spans = AlpacaTemplate(eos_token="</s>").spans(Row(0, "Name a fruit.", "", "Apple"))
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
    spans = ChatTemplate(tokenizer).spans(Row(0, "Give the plural.", "cat", "cats"))
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
        prompt, answer = ChatTemplate(tokenizer).spans(Row(0, "Name a fruit.", "", output))
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
        with pytest.raises(UserError, match=message):
            build_template("chat", tokenizer).spans(Row(0, "Say it.", "", "It"))
    finally:
        tokenizer.chat_template = kept
