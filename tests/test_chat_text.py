"""Reasoning and calls of tools in the text of an answer, however it is cut."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("msgspec", reason="needs the extra `serve`")

from nanovllm.entrypoints.server.answers import AnswerSettings, Chat, Choice, TokenNames
from nanovllm.entrypoints.server.chat_text import ChatText, Said, ToolCall, with_parsed_arguments
from nanovllm.entrypoints.server.parameters import chat_of
from nanovllm.entrypoints.server.problems import Problem
from nanovllm.outputs import RequestOutput

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = ToolCall("weather", '{"city":"Paris"}')
TIME = ToolCall("time", "{}")

CASES = [
    ("plain", {}, "  Hello <think> there <tool_call>", Said("", "  Hello <think> there <tool_call>")),
    ("no thought", {"finds_reasoning": True}, " \n Hello <think>", Said("", " \n Hello <think>")),
    (
        "a thought",
        {"finds_reasoning": True},
        "\n<think>\nI am < here >\n\n</think>\n\nHello \n",
        Said("I am < here >", "Hello \n"),
    ),
    (
        "a thought begun",
        {"finds_reasoning": True, "in_reasoning": True},
        "\nSo </thin </think>Hello",
        Said("So </thin", "Hello"),
    ),
    ("a thought not ended", {"finds_reasoning": True}, "<think>So it  goes </thi", Said("So it  goes </thi", "")),
    ("no thought at all", {"finds_reasoning": True}, "<thin", Said("", "<thin")),
    ("a call", {"finds_calls": True}, CALL, Said("", "", [WEATHER])),
    ("words and calls", {"finds_calls": True}, f"I look.\n\n{CALL}\n{CALL}\n", Said("", "I look.", [WEATHER, WEATHER])),
    ("no arguments", {"finds_calls": True}, '<tool_call>{"name": "time"}</tool_call>', Said("", "", [TIME])),
    (
        "a call that is no JSON",
        {"finds_calls": True},
        "a <tool_call>{</tool_call> b",
        Said("", "a <tool_call>{</tool_call> b"),
    ),
    (
        "a call without a name",
        {"finds_calls": True},
        "<tool_call>[1]</tool_call>",
        Said("", "<tool_call>[1]</tool_call>"),
    ),
    ("a call that is not ended", {"finds_calls": True}, CALL[:-3], Said("", CALL[:-3])),
    ("whitespace", {"finds_calls": True}, "a \n b \n", Said("", "a \n b \n")),
    (
        "all at once",
        {"finds_reasoning": True, "finds_calls": True},
        f"<think>\n{CALL}?\n</think>\n\nI do.\n{CALL}",
        Said(f"{CALL}?", "I do.", [WEATHER]),
    ),
]


def read(options, pieces):
    text = ChatText(**{"finds_reasoning": False, "in_reasoning": False, "finds_calls": False, **options})
    found = Said()
    for number, piece in enumerate(pieces):
        said = text.add(piece, is_last=number == len(pieces) - 1)
        found = Said(found.reasoning + said.reasoning, found.content + said.content, found.calls + said.calls)
    return found


@pytest.mark.parametrize(("options", "text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_an_answer_says_the_same_however_it_is_cut(options, text, expected):
    assert read(options, [text]) == expected
    assert read(options, [*text, ""]) == expected
    for cut in range(len(text)):
        assert read(options, [text[:cut], text[cut:]]) == expected
        assert read(options, [text[:cut], text[cut : cut + 3], text[cut + 3 :]]) == expected


def test_what_cannot_change_is_shown_at_once():
    text = ChatText(finds_reasoning=True, in_reasoning=False, finds_calls=True)
    pieces = ["<think>\n", "I th", "ink ", "so.</", "think>\n\n", "Hel", "lo"]
    shown = [text.add(piece, is_last=False) for piece in pieces]
    assert [said.reasoning for said in shown] == ["", "I th", "ink", " so.", "", "", ""]
    assert [said.content for said in shown] == [""] * 5 + ["Hel", "lo"]


def test_arguments_of_calls_become_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (parsed,) = with_parsed_arguments([message])
    assert parsed["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1]}}
    assert json.loads(call["function"]["arguments"]) == {"a": [1]}, "what was given stays as it is"
    for malformed in (None, "x", [3], [{"tool_calls": 3}], [{"tool_calls": [3]}]):
        assert with_parsed_arguments(malformed) == malformed
    call["function"]["arguments"] = "{"
    assert with_parsed_arguments([message]) == [message]


def chat():
    def make_text():
        return ChatText(finds_reasoning=True, in_reasoning=False, finds_calls=True)

    return Chat(AnswerSettings("chatcmpl-0", "it", TokenNames(None)), make_text)


def test_an_answer_with_reasoning_and_calls():
    text = f"<think>Hm.</think>I look.{CALL}{CALL}"
    (choice,) = chat().whole([Choice(text, 9, [], "stop")], 5)["choices"]
    calls = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."}
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": '{"city":"Paris"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    (choice,) = chat().whole([Choice(CALL, 9, [], "length")], 5)["choices"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"


def test_the_same_in_chunks():
    answers = chat()
    pieces = ["<think>", "Hm.", "</think>", "I look.", CALL[:9], CALL[9:], CALL, ""]
    outputs = [RequestOutput(0, [1], piece) for piece in pieces]
    outputs[-1].finished, outputs[-1].finish_reason = True, "stop"
    chunks = [chunk for output in outputs if (chunk := answers.chunk(0, output)) is not None]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[:3] == [{"role": "assistant", "content": ""}, {"reasoning_content": "Hm."}, {"content": "I look."}]
    assert [call["index"] for delta in deltas[3:5] for call in delta["tool_calls"]] == [0, 1]
    assert deltas[5:] == [{"content": ""}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["tool_calls"]


def test_tools_that_are_asked_for():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [tool]}
    asked = chat_of(body, 100)
    assert asked.may_call
    assert asked.template_options["tools"] == [tool]
    asked = chat_of({**body, "tool_choice": "none"}, 100)
    assert not asked.may_call
    assert "tools" not in asked.template_options
    for tools in ([{"type": "custom"}], [3], "f", [{"type": "function", "function": {"name": "f", "strict": True}}]):
        with pytest.raises(Problem, match="tools"):
            chat_of({**body, "tools": tools}, 100)
