"""Templates are read rightly: what they can see of contents decides what may be found only once."""

import random

import pytest

from pipeline.rendering import Renderer
from pipeline.template_sight import needles_of
from templates import FORMATS, PUBLISHED, make_tokenizer

LOOP = "{% for message in messages %}"
END = "{% endfor %}"
BLIND = [
    ("{{ message.role + ': ' + message['content'] | trim ~ '\\n' }}", ()),
    ("{% if message.content %}{{ message.content }}{% endif %}", ()),
    ("{% if message.content is string %}{{ message.get('content') }}{% endif %}", ()),
    ("{% if '</think>' in message.content %}{{ message.content[3:] }}{% endif %}", ("</think>",)),
    ("{% if message.content == 'go' %}x{% else %}{{ message.content }}{% endif %}", ("go",)),
    ("{% if message.content.startswith('/no') %}quiet{% endif %}", ("/no",)),
    ("{{ message.content.split('</a>')[-1].lstrip('\\n') }}", ("</a>",)),
    ("{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}", ()),
    ("{% if loop.previtem is defined and loop.previtem.role == 'tool' %}x{% endif %}", ()),
    ("{% if loop.index0 > messages | length - 2 %}{{ message.content }}{% endif %}", ()),
    ("{% set a = message.content %}{% if loop.last %}{% set a = 'z' %}{% endif %}{{ a }}", ()),
    ("{% if not message.content is string %}{{ message.content | join }}{% endif %}", ()),
    ("{{ ('' if '<a>' in message.content and loop.last else 'b') + message.content }}", ("<a>",)),
    ("{% if message.role == 'tool' %}{{ message.content | tojson }}{% endif %}", ()),
]
SEES = [
    "{{ message.content | length }}",
    "{% if message.content | length < 9 %}(short) {% endif %}{{ message.content }}",
    "{% if message.content > 'm' %}x{% endif %}",
    "{% if message.content in 'abc' %}x{% endif %}",
    "{% if message.content == messages[0].content %}x{% endif %}",
    "{% if message == messages[-1] %}x{% endif %}",
    "{{ message }}",
    "{{ message | tojson }}",
    "{{ messages | tojson }}",
    "{{ message.items() | list }}",
    "{{ message['values']() | list }}",
    "{{ message.content | upper }}",
    "{{ message.content[0] }}",
    "{{ message.content.strip('x') }}",
    "{{ message.content.split('a') | length }}",
    "{{ message.content.split('a')[1] }}",
    "{{ message.content.split(message.role)[0] }}",
    "{{ '%s' % message.content }}",
    "{{ {'a': message.content}['a'] }}",
    "{{ [message.content] | join }}",
    "{{ message[message.content] }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
    "{{ raise_exception(message.content) }}",
    "{{ loop.changed(message.content) }}",
    "{{ message.content is divisibleby(2) }}",
    "{{ message.content is in('abc') }}",
    "{% if message.content ~ 'a' == 'ba' %}x{% endif %}",
    "{% if 'ba' in 'b' ~ message.content %}x{% endif %}",
    "{% for letter in message.content %}x{% endfor %}",
    "{% for key in message %}{{ message[key] }}{% endfor %}",
    "{% for key, value in message.items() %}{{ value }}{% endfor %}",
    "{% set x %}{{ message.content }}{% endset %}{{ x | length }}",
    "{% macro m(a) %}{{ a | length }}{% endmacro %}{{ m(message.content) }}",
    "{% set ns = namespace(a=message.content) %}{{ ns.a | length }}",
    "{% set ns = namespace(a='') %}{% set ns.a = message.content %}{{ ns.a | length }}",
    "{% filter upper %}{{ message.content }}{% endfilter %}",
    "{% with a = message.content %}{{ a | length }}{% endwith %}",
    "{% set a, b = message.content, 'x' %}{{ a | length }}",
    "{% set a = message.content if loop.last else 'abc' %}{% if 'b' in a %}x{% endif %}"
    "{{ a | length }}",
    "{% set m = message if loop.last else 'a' %}{{ m }}",
    "{% no_such_tag %}",
]


@pytest.mark.parametrize(("body", "needles"), BLIND)
def test_what_only_writes_contents_down_is_blind(body: str, needles: tuple[str, ...]) -> None:
    assert needles_of(LOOP + body + END) == needles


@pytest.mark.parametrize("body", SEES)
def test_what_does_anything_else_with_contents_sees(body: str) -> None:
    assert needles_of(LOOP + body + END) is None
    assert needles_of(LOOP + "{{ message.role }}" + END) == ()


@pytest.mark.parametrize("branch", ["message.role == 'user'", "'x' in message.content"])
def test_a_name_set_in_a_branch_is_what_either_branch_made_it(branch: str) -> None:
    body = f"{{% set a = 'abc' %}}{{% if {branch} %}}{{% set a = message.content %}}{{% endif %}}"
    seen = needles_of(LOOP + body + "{{ a | length }}" + END)
    assert seen == (None if "role" in branch else ("x",))  # without needles, the other isn't taken


def test_names_set_in_a_loop_are_gone_after_it() -> None:
    loop = LOOP + "{% set a = message.content %}" + END
    assert needles_of("{% set a = 'b' %}" + loop + "{{ a | length }}") == ()
    assert needles_of("{% set messages = messages[1:] %}{{ messages[0].content | length }}") is None


def test_the_templates_of_models_are_read() -> None:
    found = {name: needles_of(make_tokenizer(name).chat_template) for name in FORMATS}
    thoughts = ("</think>",)
    sees = {"mistral_tools": None, "qwen3": thoughts, "qwen3_thinking": thoughts, "r1": thoughts}
    assert found == dict.fromkeys(FORMATS, ()) | sees
    published = ["llama3_1", "llama3_2", "qwen2_5", "gemma3", "phi3"]
    assert [needles_of(make_tokenizer(n, published=True).chat_template) for n in published] == (
        [()] * 5
    )


@pytest.mark.parametrize(
    ("name", "published"), [(n, False) for n in FORMATS] + [(n, True) for n in PUBLISHED]
)
def test_the_page_of_a_blind_template_is_that_of_other_contents(name: str, published: bool) -> None:
    """The theorem itself: put the contents into the page of placeholders."""
    tokenizer = make_tokenizer(name, published)
    needles = needles_of(tokenizer.chat_template)
    render = Renderer(tokenizer, "2024-12-24", {})
    draw = random.Random(name)
    roles = [*("user", "assistant") * 3]
    marks = [f"<<{i}>>" for i in range(6)]
    outline = render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], None)
    for _ in range(50):
        words = ["Hi.", "(short)", "\n", '"', "\\", " ", "user", "assistant", "é", "\ue000", "{{"]
        said = ["".join(draw.choices(words, k=draw.randint(1, 9))).strip() or "x" for _ in roles]
        page = outline
        for mark, content in zip(marks, said, strict=True):
            page = page.replace(mark, content)
        assert needles is None or not any(n in content for n in needles for content in said)
        rendered = render(
            [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)], None
        )
        if needles is not None:
            assert rendered == page
