"""A chat template is a program that comes with a checkpoint; all it reaches are its messages."""

import jinja2
import pytest

from recipe.data.templates import build_template
from recipe.model.checkpoint import load_tokenizer
from recipe.settings import ModelSettings

POPEN = "{% for c in ''.__class__.__mro__[1].__subclasses__() if c.__name__ == 'Popen' %}"
TEMPLATES = {
    "the classes of a text": POPEN + "{{ c(['mkdir', MARK]).wait() }}{% endfor %}",
    "the same through a filter": (
        "{% for c in (((''|attr('__class__')|attr('__mro__'))[1])|attr('__subclasses__'))() "
        "if c.__name__ == 'Popen' %}{{ c(['mkdir', MARK]).wait() }}{% endfor %}"
    ),
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].mkdir(MARK) }}",
    "namespace": ("{{ namespace.__init__.__globals__.__builtins__.__import__('os').mkdir(MARK) }}"),
    "lipsum": "{{ lipsum.__globals__['os'].mkdir(MARK) }}",
    "the template": (
        "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.mkdir(MARK) }}"
    ),
    "a function of the library": (
        "{{ raise_exception.__globals__.__builtins__.__import__('os').mkdir(MARK) }}"
    ),
    "another of it": "{{ strftime_now.__globals__.__builtins__.__import__('os').mkdir(MARK) }}",
    "a message's method": (
        "{{ messages.append.__self__.__class__.__base__.__subclasses__()[0] }}"
        "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}"
    ),
    "a macro": (
        "{% macro m() %}{% endmacro %}"
        "{{ m._func.__globals__.__builtins__.__import__('os').mkdir(MARK) }}"
    ),
    "an undefined value": (
        "{{ nothing.__init__.__globals__.__builtins__.__import__('os').mkdir(MARK) }}"
    ),
}


def written(name, marker):
    return TEMPLATES[name].replace("MARK", repr(str(marker)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_sandbox_it_runs(marker, name):
    """The control: plain jinja2 does what the template says."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    jinja2.Environment().from_string(written(name, marker)).render(
        messages=[], raise_exception=raise_exception, strftime_now=raise_exception
    )
    assert marker.exists()


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_refused(copy, marker, refused, name):
    (copy / "chat_template.jinja").write_text(written(name, marker))
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(copy)))
    assert tokenizer.chat_template == written(name, marker)
    refused(lambda: build_template("chat", tokenizer).prompt("hello"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}{{ os.name }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages.clear() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ 1/0 }}",
    ],
)
def test_a_template_that_reads_changes_or_fails_is_refused(copy, refused, template):
    (copy / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(copy)))
    refused(lambda: build_template("chat", tokenizer).prompt("hello"))
