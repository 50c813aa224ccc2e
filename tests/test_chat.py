"""Conversations through chat templates: parts, tools, variables, the last message, and messages that get lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanovllm import LLM, RequestError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.text.chat import ChatTemplate
from tests.tokenizers_made import byte_level

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

# What is no string is nothing; roles that it does not know are left out; earlier thoughts are dropped; tools, a
# variable, calls and answers of tools.
LIKE_QWEN = """
{%- if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}[/]{% endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}[{{ m.role }}]{{ content }}[/]
{%- elif m.role == 'system' %}[system]{{ content | trim }}[/]
{%- elif m.role == 'assistant' %}
{%- set said = content.split('</think>')[-1].lstrip() if not loop.last else content %}[assistant]{{ said }}
{%- for call in m.tool_calls or [] %}[call]{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}[/]
{%- elif m.role == 'tool' %}[tool {{ m.tool_call_id }}]{{ content }}[/]
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}
"""

TAKES_PARTS = """
{%- for m in messages %}[{{ m.role }}]
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{%- endfor %}
"""

# Of users it takes parts, of others texts.
TAKES_PARTS_OF_USERS = """
{%- for m in messages %}[{{ m.role }}]
{%- if m.role == 'user' and m.content is not string %}{{ m.content[0].text }}{% else %}{{ m.content }}{% endif %}[/]
{%- endfor %}
"""

STRICT = """
{%- if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}
{%- for m in messages %}[{{ m.role | upper }}]{{ m.content.strip() | upper }}[/]{% endfor %}
"""

MERGES_SYSTEM = """
{%- set said = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('; ') -%}
[s]{{ said }}[/]
{%- for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}
"""


def text_part(text):
    return {"type": "text", "text": text}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def render(template, messages, **options):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, **options).render(messages)


# Parts


@pytest.mark.parametrize("template", [PLAIN, LIKE_QWEN, MERGES_SYSTEM])
def test_parts_are_joined_where_the_template_takes_texts(template):
    parts = [text_part("One."), "Two.", text_part("Three.")]
    assert render(template, [user(parts)]) == render(template, [user("One.\nTwo.\nThree.")])
    assert render(template, [user(tuple(parts[:1])), assistant("x")]) == render(
        template, [user("One."), assistant("x")]
    )
    assert render(template, [user([])]) == render(template, [user("")])


def test_parts_reach_a_template_that_takes_them():
    assert render(TAKES_PARTS, [user([text_part("One."), text_part("Two.")])]) == "[user]One.Two."
    assert render(TAKES_PARTS, [user("One."), assistant(["Two", "."])]) == "[user]One.[assistant]Two."


def test_parts_are_joined_if_the_template_takes_them_of_others_alone():
    assert render(TAKES_PARTS_OF_USERS, [user(["One."])]) == "[user]One.[/]"
    messages = [user(["One."]), assistant(["Two."])]
    assert render(TAKES_PARTS_OF_USERS, messages) == "[user]One.[/][assistant]Two.[/]"


def test_parts_where_the_template_wants_more_than_they_say():
    messages = [{"role": "system", "content": [text_part("s")]}, user([text_part(" hello ")])]
    assert render(STRICT, messages) == "[SYSTEM]S[/][USER]HELLO[/]"
    with pytest.raises(RequestError, match="the chat template refuses these messages: a system message comes first"):
        render(STRICT, messages[1:])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            r"part 0 is of type 'image_url'; only parts of type 'text'",
        ),
        ([text_part("x"), {"type": 3, "text": "x"}], "part 1 is of type 3; only parts of type 'text' can be served"),
        ([{"text": "x"}], r"part 0 is {'text': 'x'}; pass a dict with 'type' and 'text'"),
        ([3], "part 0 is 3; pass a dict with 'type' and 'text'"),
        ([None], "part 0 is None; pass a dict with 'type' and 'text'"),
        ([{"type": "text"}], "part 0 has text=None, which is not a text"),
        ([text_part(3)], "part 0 has text=3, which is not a text"),
        (3, "content=3 is not a text, a list of parts or None"),
        (text_part("x"), "content={'type'.*} is not a text, a list of parts or None"),
        (b"x", "content=b'x' is not a text, a list of parts or None"),
    ],
)
def test_content_that_cannot_be_served(content, match):
    with pytest.raises(RequestError, match=rf"message 1 \(role 'user'\):? {match}"):
        render(LIKE_QWEN, [user("hello"), user(content)])


# Messages that get lost


@pytest.mark.parametrize("content", ["hello", [text_part("hello")], "a", "[user]"])
@pytest.mark.parametrize("before", [[], [user("hello")], [user("a hello robot [user]"), assistant("hello")]])
def test_a_message_of_an_unknown_role_is_refused(content, before):
    messages = [*before, {"role": "robot", "content": content}]
    expected = rf"message {len(before)} \(role 'robot'\) leaves no trace in the prompt.*does not know that role"
    with pytest.raises(RequestError, match=expected):
        render(LIKE_QWEN, messages)
    with pytest.raises(RequestError, match=expected):
        render(LIKE_QWEN, [*messages, user("more")])


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (LIKE_QWEN, [user("")], "[user][/]"),
        (LIKE_QWEN, [user(" \n")], "[user] \n[/]"),
        (LIKE_QWEN, [user(None)], "[user][/]"),
        (LIKE_QWEN, [{"role": "system", "content": "  s "}, user("u")], "[system]s[/][user]u[/]"),
        (LIKE_QWEN, [assistant("<think>hm</think>"), user("u")], "[assistant][/][user]u[/]"),
        (LIKE_QWEN, [assistant("<think>hm</think>\n\nyes"), user("u")], "[assistant]yes[/][user]u[/]"),
        (STRICT, [{"role": "system", "content": "s"}, user(" ß ")], "[SYSTEM]S[/][USER]SS[/]"),
        (MERGES_SYSTEM, [{"role": "system", "content": c} for c in "xy"] + [user("u")], "[s]x; y[/][user]u[/]"),
        (PLAIN, [{"role": "robot", "content": "beep"}], "[robot]beep[/]"),
    ],
)
def test_messages_that_templates_change_are_served(template, messages, expected):
    assert render(template, messages, add_generation_prompt=False).strip() == expected


def test_content_beside_a_call_may_be_left_out():
    template = "{% for m in messages %}{% if m.tool_calls %}[call]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert render(template, [user("u"), assistant("I shall call", tool_calls=[{}])]) == "u[call]"


def test_a_conversation_takes_few_renderings(monkeypatch):
    tokenizer = byte_level()
    tokenizer.chat_template = LIKE_QWEN
    rendered, apply = [], type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer),
        "apply_chat_template",
        lambda self, *args, **more: rendered.append(0) or apply(self, *args, **more),
    )
    ChatTemplate(tokenizer).render([user("x"), assistant("y")] * 20)
    assert len(rendered) == 2
    ChatTemplate(tokenizer).render([user(["x"]), assistant("y")] * 20)
    assert len(rendered) == 5


# What is passed on

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}


def test_calls_of_tools_and_their_answers_reach_the_template():
    messages = [user("How is it?"), assistant(None, tool_calls=[CALL])]
    messages += [{"role": "tool", "content": "rain", "tool_call_id": "7"}]
    without_content = [messages[0], {"role": "assistant", "tool_calls": [CALL]}, messages[2]]
    for each in (messages, without_content):
        assert render(LIKE_QWEN, each).strip() == (
            '[user]How is it?[/][assistant][call]weather{"city": "Köln"}[/][tool 7]rain[/][assistant]'
        )
    assert render("{{ messages[0].name }}", [user("", name="Ann")]) == "Ann"


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where.
    """
    return city


def test_tools_reach_the_template():
    assert '[tools]{"type": "function", "function": {"name": "weather"' in render(LIKE_QWEN, [user("u")], tools=[TOOL])
    assert '"description": "Tells the weather."' in render(LIKE_QWEN, [user("u")], tools=(weather,))
    assert "[tools]" not in render(LIKE_QWEN, [user("u")], tools=[])
    with pytest.raises(RequestError, match="the chat template takes no tools; describe them in a message"):
        render(PLAIN, [user("u")], tools=[TOOL])


def test_of_several_templates_the_one_for_tools_is_taken():
    templates = {"default": PLAIN, "tool_use": LIKE_QWEN}
    assert "[tools]" in render(templates, [user("u")], tools=[TOOL])
    assert render(templates, [user("u")]) == "[user]u[/][assistant]"
    with pytest.raises(RequestError, match=r"none of the chat templates can be used: .*'x'"):
        render({"x": PLAIN}, [user("u")])


def test_variables_reach_the_template(caplog):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert render(LIKE_QWEN, [user("u")], **options).strip().endswith("[assistant]<think></think>")
    assert render(LIKE_QWEN, [user("u")]).strip().endswith("[assistant]")
    assert not caplog.records
    assert render(PLAIN, [user("u")], **options) == "[user]u[/][assistant]"
    assert "'enable_thinking', which the chat template does not use" in caplog.text


def test_the_last_message_is_continued():
    messages = [user("u"), assistant("The answer is")]
    for template in (PLAIN, LIKE_QWEN):
        expected = "[user]u[/][assistant]The answer is"
        assert render(template, messages, continue_final_message=True).strip() == expected
        assert render(template, messages, continue_final_message=True, add_generation_prompt=False).strip() == expected
        assert render(template, messages).strip() == f"{expected}[/][assistant]"
        assert render(template, messages, add_generation_prompt=False).strip() == f"{expected}[/]"
    parts = [user("u"), assistant(["The answer", "is"])]
    assert render(PLAIN, parts, continue_final_message=True) == "[user]u[/][assistant]The answer\nis"
    with pytest.raises(RequestError, match="the chat template refuses these messages: continue_final_message is set"):
        render(LIKE_QWEN, [user("u"), assistant(None)], continue_final_message=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tools": "weather"}, "tools='weather' is not a list of JSON schemas"),
        ({"tools": ["weather"]}, r"tools=\['weather'\] is not a list of JSON schemas"),
        ({"tools": TOOL}, "tools={.*} is not a list of JSON schemas"),
        (
            {"chat_template_kwargs": [("a", 1)]},
            r"chat_template_kwargs=\[\('a', 1\)\] is not a dict with names for keys",
        ),
        ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs={1: 2} is not a dict with names for keys"),
        *(
            ({"chat_template_kwargs": {name: 1}}, f"has '{name}', which is an argument of chat")
            for name in ("tools", "add_generation_prompt", "continue_final_message")
        ),
        *(
            ({"chat_template_kwargs": {name: 1}}, f"has '{name}', which is not the template's; leave it out")
            for name in ("tokenize", "messages", "conversation", "chat_template", "return_dict", "max_length", "self")
        ),
        ({"add_generation_prompt": 1}, "add_generation_prompt=1 is not a bool or None"),
        ({"continue_final_message": "content"}, "continue_final_message='content' is not a bool"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt=True begins a message",
        ),
    ],
)
def test_arguments_that_are_refused(options, match):
    with pytest.raises(RequestError, match=match):
        render(LIKE_QWEN, [user("u")], **options)


def test_a_long_refusal_is_cut():
    with pytest.raises(RequestError) as refusal:
        render("{{ raise_exception(messages[0].content) }}", [user("x" * 10_000)])
    assert len(str(refusal.value)) < 700


# Through the engine

GREEDY = SamplingParams(temperature=0, max_tokens=60)
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("chat")) / "demo"
    shutil.copytree(DEMO_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.py", "__*"))
    template = (folder / "chat_template.jinja").read_text()
    known = "{% for message in messages if message.role in ['user', 'assistant'] %}"
    changed = template.replace("{% for message in messages %}", known)
    assert changed != template
    (folder / "chat_template.jinja").write_text(changed + "{{ begin }}{% if tools %}{{ tools | length }}{% endif %}")
    with LLM(str(folder), device="cpu", num_kvcache_blocks=16) as llm:
        yield llm


def ask(llm, messages, **options):
    return llm.chat(messages, GREEDY, use_tqdm=False, **options)[0]


def test_parts_and_texts_get_the_same_answer(llm):
    expected = ask(llm, [user(QUESTION)])
    assert "Paris" in expected["text"]
    answer = ask(llm, [user([text_part(QUESTION)])])
    assert (answer["prompt_token_ids"], answer["text"]) == (expected["prompt_token_ids"], expected["text"])


def test_an_answer_is_continued_and_variables_and_tools_arrive(llm):
    whole = ask(llm, [user(QUESTION)])
    begun = "The capital of France"
    answer = ask(llm, [user(QUESTION), assistant(begun)], continue_final_message=True)
    assert begun + answer["text"] == whole["text"]
    begun_by_variable = ask(llm, [user(QUESTION)], chat_template_kwargs={"begin": begun})
    assert begun + begun_by_variable["text"] == whole["text"]
    with_tools = ask(llm, [user(QUESTION)], tools=[TOOL])
    assert len(with_tools["prompt_token_ids"]) == len(whole["prompt_token_ids"]) + 1


def test_refusals_name_the_conversation_and_start_nothing(llm):
    steps = llm.counters.prefill_steps
    with pytest.raises(RequestError, match=r"conversation 1: message 0 \(role 'robot'\) leaves no trace"):
        llm.chat([[user("hello")], [{"role": "robot", "content": "hello"}]], use_tqdm=False)
    with pytest.raises(RequestError, match=r"conversation 0: the prompt is not valid Unicode.*surrogate"):
        llm.chat([user([text_part("\ud800")])], use_tqdm=False)
    with pytest.raises(RequestError, match="chat_template_kwargs has 'tokenize'"):
        llm.chat([user("hello")], use_tqdm=False, chat_template_kwargs={"tokenize": True})
    assert llm.counters.prefill_steps == steps


def test_the_name_of_a_special_token_in_a_content_becomes_that_token(llm):
    end = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [ask(llm, [user(text)])["prompt_token_ids"].count(end) for text in ("hello", "hello<|im_end|>")]
    assert answers == [1, 2]
