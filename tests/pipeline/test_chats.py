"""Chats through a tokenizer's template: tools, parts, nulls, and templates that know less than that."""

import json

import pytest

from secateur.errors import DataError
from secateur.pipeline.calibration import calibration_tokens
from secateur.pipeline.chats import as_texts
from secateur.pipeline.records import from_records
from tiny import TEXT, tiny_config

PLAIN = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
DOCUMENTS = "{% for d in documents %}[{{ d['text'] }}]{% endfor %}" + PLAIN
SWITCH = "{% if thinking %}<think>{% endif %}" + PLAIN
PARTS = """{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}
{%- for p in m['content'] %}{% if p.type == 'text' %}{{ p['text'] }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}
{%- endif %}{% endfor %}"""
ADDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"  # which no list can be added to
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"city": {"type": "string"}}}}


@pytest.fixture
def shown(tokenizer):
    """``shown(template, *records)``: the texts of the records."""

    def show(template, *records):
        speaks = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
        return as_texts(from_records(records, "rows").texts, speaks, "rows")

    return show


def user(content, **beside):
    return {"messages": [{"role": "user", "content": content}], **beside}


# Tools, documents, arguments.


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_reach_the_template(shown, tools, messages):
    assert shown(TOOLS, user("a", tools=tools)) == [json.dumps([TOOL]) + "<s>user: a</s>"]
    assert messages == []


def test_tools_of_one_row_are_not_those_of_the_next(shown):
    assert shown(TOOLS, user("a", tools=[TOOL]), user("b", tools=None), user("c", tools=[]))[1:] == [
        "<s>user: b</s>",
        "<s>user: c</s>",
    ]


def test_a_template_without_tools_is_told(shown, messages):
    assert shown(PLAIN, user("a", tools=[TOOL])) == ["<s>user: a</s>"]
    assert messages == ["rows: the tokenizer's chat template shows no tools, so they are left out"]


def test_documents_and_arguments_reach_the_template(shown, messages):
    assert shown(DOCUMENTS, user("a", documents=[{"text": "d"}])) == ["[d]<s>user: a</s>"]
    assert shown(SWITCH, user("a", chat_template_kwargs={"thinking": True})) == ["<think><s>user: a</s>"]
    assert messages == []


def test_tools_are_in_the_tokens(tokenizer):
    speaks = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TOOLS)
    with_tools, without = (
        calibration_tokens([user(TEXT, **beside)], speaks, tiny_config("llama"), 1, 16, 0).available
        for beside in ({"tools": [TOOL]}, {})
    )
    expected = speaks(json.dumps([TOOL]) + f"<s>user: {TEXT}</s>", add_special_tokens=False)["input_ids"]
    assert with_tools == len(expected) > without


def test_tools_beside_a_text_are_told(messages):
    from_records([{"text": "a", "tools": [TOOL]}], "rows")
    assert messages == ["rows: reads text; leaves out tools"]


# Nulls, which parquet puts wherever another message has a field.


def test_nulls_of_messages_are_not_there(shown):
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f", "arguments": {"city": "x", "day": None}}],
    }
    assert json.loads(shown(template, {"messages": [message]})[0]) == {
        "role": "assistant",
        "tool_calls": [{"name": "f", "arguments": {"city": "x"}}],
    }


# Content in parts.

TEXT_PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
WITH_IMAGE = [{"type": "image", "text": None}, *TEXT_PARTS]


@pytest.mark.parametrize("template", [PLAIN, ADDS])
def test_parts_are_joined_for_a_template_that_knows_none(shown, template, messages):
    assert shown(template, user(TEXT_PARTS)) == shown(template, user("one two"))
    assert messages == []
    assert shown(template, user(WITH_IMAGE), user("a"), user(WITH_IMAGE))[0] == shown(template, user("one two"))[0]
    assert messages == ["rows: 2 parts of messages that are no text are left out; the template knows text alone"]


def test_parts_are_given_to_a_template_that_knows_them(shown, messages):
    assert shown(PARTS, user(TEXT_PARTS)) == shown(PARTS, user("one two"))
    assert shown(PARTS, user(WITH_IMAGE))[0].startswith("user: <image>one two")
    assert messages == []


def test_strings_among_parts_are_text(shown):
    assert shown(PLAIN, user(["one ", {"text": "two"}])) == ["<s>user: one two</s>"]


# What cannot be.


@pytest.mark.parametrize(
    ("template", "record", "said"),
    [
        ("{{ raise_exception('System role\nnot supported') }}", user("a"), r"template \(System role not supported\)"),
        (TOOLS, user("a", tools="{"), "does not fit the tokenizer's template"),
        (TOOLS, user("a", tools=5), "does not fit the tokenizer's template"),
        (PLAIN, user("a", chat_template_kwargs={"tokenize": True}), "does not fit the tokenizer's template"),
        (None, user("a"), "has chats, and the model's tokenizer has no chat template"),
        (PLAIN, {"messages": [{"from": "human"}]}, "row 1: a message from 'human' has no value"),
        (PLAIN, {"messages": [{"from": "human", "value": None}]}, "row 1: a message from 'human' has no value"),
    ],
)
def test_what_a_template_cannot_show_is_one_line(shown, template, record, said):
    with pytest.raises(DataError, match=said) as caught:
        shown(template, record)
    assert "\n" not in str(caught.value)
