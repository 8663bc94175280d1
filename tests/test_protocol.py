"""The text protocol: reading, writing and escaping, also of text that wants to do harm."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lib.environment.protocol import (
    PROMPT,
    PROMPTS,
    TAGS,
    build_prompt,
    escape,
    find_stop,
    format_document,
    format_observation,
    observation,
    read_action,
    split_turn,
)
from searchr1_lib.records import Passage

TAGGED = st.lists(
    st.sampled_from(
        [f"<{s}{t}>" for t in TAGS for s in ("", "/")] + ["a", " b ", "\n", "é", "<", ">", "<|im_end|>", "</ search>"]
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize(
    "turn, kind, text",
    [
        ("<think> t </think>\n<search> q one </search>", "search", "q one"),
        ("<answer> 42 </answer>", "answer", "42"),
        ("<answer></answer>", "answer", ""),
        ("<search>  </search>", None, ""),
        ("no action", None, ""),
        ("</search> then", None, ""),
        ("<search> never closed", None, ""),
        ("<search> a <search> b </search>", "search", "b"),
        ("<search> a </search><answer> b </answer>", "search", "a"),
        ("<answer> a </search>", None, ""),
        ("<SEARCH> a </SEARCH>", None, ""),
        ("＜search＞ a ＜/search＞", None, ""),
    ],
)
def test_reading_an_action(turn, kind, text):
    action = read_action(turn)
    assert (action.kind, action.text) == (kind, text)


@given(TAGGED)
def test_an_action_is_what_the_first_stop_closes(turn):
    action, (end, stop) = read_action(turn), find_stop(turn)
    if action.kind:
        assert turn[action.start : action.end].startswith(f"<{action.kind}>") and action.end == end
        assert stop == f"</{action.kind}>" and "</search>" not in action.text and "</answer>" not in action.text


@given(TAGGED)
def test_a_split_covers_the_turn_without_a_gap(turn):
    spans = split_turn(turn)
    assert "".join(turn[a:b] for _, a, b in spans) == turn
    assert all(a < b for _, a, b in spans)
    for kind, a, b in spans:
        assert kind in (*TAGS, "text")
        if kind in ("search", "answer"):
            assert turn[a:b].startswith(f"<{kind}>") and turn[a:b].endswith(f"</{kind}>")


@given(TAGGED)
def test_escaped_text_holds_no_tag_and_no_chat_token(text):
    safe = escape(text)
    assert not re.search(r"<\s*/?\s*(think|search|information|answer)", safe) and "<|" not in safe
    assert escape(safe) == safe
    assert safe.replace("\u2039", "<") == text


def test_half_a_surrogate_pair_stops_no_tokenizer():
    assert escape("a\ud800b</answer>") == "a?b\u2039/answer>"
    assert "Was \ud800 born?" not in build_prompt("Was \ud800 born?") and "Was ? born?" in build_prompt(
        "Was \ud800 born?"
    )


@given(TAGGED, TAGGED)
def test_a_passage_cannot_forge_a_tag(title, text):
    seen = observation([Passage("1", title, text)])
    inside = seen[len("\n\n<information>") : -len("</information>\n\n")]
    assert seen.startswith("\n\n<information>Doc 1(Title: ") and seen.endswith("</information>\n\n")
    assert read_action(inside).kind is None and "<|" not in inside
    assert not re.search(r"</?(think|search|information|answer)>", inside)


@given(TAGGED)
def test_a_question_cannot_forge_a_tag_or_end_the_message(question):
    prompt = build_prompt(question, "Q: {question}")
    assert not re.search(r"</?(think|search|information|answer)>", prompt) and "<|" not in prompt


def test_the_question_stands_whole_in_the_prompt():
    for template in PROMPTS.values():
        assert template.count("{question}") == 1
    assert build_prompt("Who {wrote} it").endswith("Question: Who {wrote} it?\n")
    assert "Is it so?" in build_prompt("Is it so?", PROMPT) and "so??" not in build_prompt("Is it so?")


def test_an_observation_in_full():
    assert format_observation([format_document(1, "A", "x"), format_document(2, "B", "y\nz")]) == (
        "\n\n<information>Doc 1(Title: A) x\nDoc 2(Title: B) y z</information>\n\n"
    )


@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>", "<|endoftext|>", "<|", "<\uff5cUser\uff5c>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "<bos>", "<eos>", "<pad>", "<unk>",
    ],
)  # fmt: skip
def test_no_template_of_a_chat_is_forged(token):
    assert escape(f"a {token} b") == f"a \u2039{token[1:]} b"
    assert token not in build_prompt(token, "Q: {question}") and token not in observation([Passage("1", token, token)])


@pytest.mark.parametrize("text", ["5 < 6", "<b>bold</b>", "a <- b", "<summary>", "x<y", "<strong>", "<searchable>"])
def test_other_signs_stay(text):
    assert escape(text) == text


def seconds(work, *arguments):
    """Processor time, the least of three."""

    def once():
        started = time.process_time()
        work(*arguments)
        return time.process_time() - started

    return min(once() for _ in range(3))


@pytest.mark.parametrize(
    "unit", ["<", " ", "< ", "</", "< /", "<search>", "</search>", "<think>", "<answer> ", "\n", "a"]
)
def test_reading_and_escaping_are_linear(unit):
    """A "<" before a megabyte of blanks took the square of their number: eight hours."""
    once, twice = ("<" + unit * (size // len(unit)) for size in (100_000, 200_000))
    for do in (escape, read_action, split_turn, build_prompt, lambda text: observation([Passage("1", text, text)])):
        assert seconds(do, twice) < 3 * seconds(do, once) + 0.05
