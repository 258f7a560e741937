"""Every form's input, token by token, with a tokenizer whose tokens are letters."""

import numpy as np
import pytest

from gpt1_jax.data.examples import Choices, Conversation, Labelled, Pair
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.forms import check_room, encode, special_tokens
from gpt1_jax.text.conversation import Message

START, DELIMITER, CLASSIFY = 28, 29, 30  # behind the vocabulary, in this order
SYSTEM, USER, ASSISTANT, END = 28, 29, 30, 31


@pytest.fixture
def encoded(letters):
    def encoded(task, examples, context_length=16):
        return list(encode(task, examples, letters.with_special_tokens(special_tokens(task)), context_length))

    return encoded


def tokens(example):
    return [sequence.tolist() for sequence in example.sequences]


def learned(example):
    return [mask.astype(int).tolist() for mask in example.learned]


def test_special_tokens_of_each_form(settings, letters):
    three, two = ("_start_", "_delimiter_", "_classify_"), ("_start_", "_delimiter_")
    for form in ("classification", "number", "entailment", "similarity", "multiple_choice"):
        assert special_tokens(settings(form).task) == three
    assert special_tokens(settings("text_to_text").task) == two
    assert special_tokens(settings("chat").task) == ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    # On a chat model they come behind those it has.
    assert letters.with_special_tokens(["<|end|>"]).with_special_tokens(two).special_id("_delimiter_") == 30


def test_classification(settings, encoded):
    (example,) = encoded(settings("classification").task, [Labelled(("abc",), 2)])
    assert tokens(example) == [[START, 0, 1, 2, CLASSIFY]]
    assert learned(example) == [[0, 1, 1, 1, 1]]  # the classify token too, as the authors' mask has it
    assert (example.label, example.truncated) == (2.0, False)
    assert [array.dtype for array in (*example.sequences, *example.learned)] == [np.int32, bool]


def test_one_text_may_fill_the_context(settings, encoded):
    task = settings("classification").task
    whole, cut = encoded(task, [Labelled(("a" * 13 + "b",), 0), Labelled(("a" * 13 + "bc",), 0)])
    assert tokens(whole) == tokens(cut) == [[START, *[0] * 13, 1, CLASSIFY]]
    assert (whole.truncated, cut.truncated) == (False, True)


def test_an_empty_text_is_two_special_tokens(settings, encoded):
    (example,) = encoded(settings("classification").task, [Labelled(("",), 0)])
    assert tokens(example) == [[START, CLASSIFY]] and learned(example) == [[0, 1]]


def test_entailment(settings, encoded):
    task = settings("entailment").task
    fits, first_cut, both_cut = encoded(
        task, [Labelled(("ab", "c"), 1), Labelled(("abcdefg", "a"), 0), Labelled(("abcdefgh", "zyxwvuts"), 0)]
    )
    assert tokens(fits) == [[START, 0, 1, DELIMITER, 2, CLASSIFY]]
    # n_ctx // 2 - 2 = 6 of each, however short the other is: transform_roc of the authors' train.py
    assert tokens(first_cut) == [[START, 0, 1, 2, 3, 4, 5, DELIMITER, 0, CLASSIFY]]
    assert tokens(both_cut) == [[START, 0, 1, 2, 3, 4, 5, DELIMITER, 25, 24, 23, 22, 21, 20, CLASSIFY]]
    assert [example.truncated for example in (fits, first_cut, both_cut)] == [False, True, True]
    assert len(both_cut.sequences[0]) <= 16


def test_similarity_has_both_orders(settings, encoded):
    (example,) = encoded(settings("similarity").task, [Labelled(("ab", "cde"), 2.5)])
    assert tokens(example) == [
        [START, 0, 1, DELIMITER, 2, 3, 4, CLASSIFY],
        [START, 2, 3, 4, DELIMITER, 0, 1, CLASSIFY],
    ]
    assert learned(example) == [[0] + [1] * 7] * 2
    assert example.label == 2.5


def test_multiple_choice_has_a_sequence_for_each_answer(settings, encoded):
    (example,) = encoded(settings("multiple_choice").task, [Choices("ab", "", ("c", "de", "f"), 1)])
    assert tokens(example) == [
        [START, 0, 1, DELIMITER, 2, CLASSIFY],
        [START, 0, 1, DELIMITER, 3, 4, CLASSIFY],
        [START, 0, 1, DELIMITER, 5, CLASSIFY],
    ]
    assert example.label == 1.0


def test_a_question_follows_its_context_which_is_what_is_cut(settings, encoded):
    task = settings("multiple_choice", question="q").task
    fits, context_cut, answer_cut, question_cut, question_alone = encoded(
        task,
        [
            Choices("ab", "q", ("c", "d"), 0),
            Choices("abcdef", "qr", ("c", "d"), 0),
            Choices("a", "q", ("abcdefg", "d"), 0),
            Choices("ab", "qrstuvw", ("c", "d"), 0),
            Choices("", "qrstuvw", ("c", "d"), 0),
        ],
    )
    assert tokens(fits)[0] == [START, 0, 1, 26, 16, DELIMITER, 2, CLASSIFY]
    assert tokens(context_cut)[0] == [START, 0, 1, 2, 26, 16, 17, DELIMITER, 2, CLASSIFY]
    assert tokens(answer_cut) == [
        [START, 0, 26, 16, DELIMITER, 0, 1, 2, 3, 4, 5, CLASSIFY],
        [START, 0, 26, 16, DELIMITER, 3, CLASSIFY],
    ]
    assert tokens(question_cut)[1] == [START, 26, 16, 17, 18, 19, 20, DELIMITER, 3, CLASSIFY]
    assert tokens(question_alone) == tokens(question_cut)
    cuts = [fits, context_cut, answer_cut, question_cut, question_alone]
    assert [example.truncated for example in cuts] == [False, True, True, True, True]


def test_text_to_text_learns_the_target_and_its_end(settings, encoded):
    task = settings("text_to_text").task  # of 16 tokens 6 are for the target, and 2 for start and delimiter
    fits, source_cut, target_cut, empty = encoded(
        task, [Pair("ab", "cd"), Pair("abcdefghi", "j"), Pair("a", "bcdefg"), Pair("a", "")]
    )
    assert tokens(fits) == [[START, 0, 1, DELIMITER, 2, 3, 27]] and learned(fits) == [[0, 0, 0, 0, 1, 1, 1]]
    assert tokens(source_cut) == [[START, 0, 1, 2, 3, 4, 5, 6, 7, DELIMITER, 9, 27]]
    assert tokens(target_cut) == [[START, 0, DELIMITER, 1, 2, 3, 4, 5, 6]]  # its end is what is lost
    assert tokens(empty) == [[START, 0, DELIMITER, 27]] and learned(empty) == [[0, 0, 0, 1]]
    assert [example.truncated for example in (fits, source_cut, target_cut, empty)] == [False, True, True, False]


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [Message(*pair) for pair in zip(roles, contents, strict=True)]
    return Conversation(tuple(([Message("system", system)] if system else []) + messages))


def test_chat_learns_the_answers_and_their_ends(settings, encoded):
    (example,) = encoded(settings("chat").task, [conversation("a", "bc", "d", "e", system="f")], 20)
    assert tokens(example) == [[SYSTEM, 5, END, USER, 0, END, ASSISTANT, 1, 2, END, USER, 3, END, ASSISTANT, 4, END]]
    assert learned(example) == [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]]
    assert not example.truncated


def test_chat_leaves_out_the_oldest_turn(settings, encoded):
    (example,) = encoded(settings("chat").task, [conversation("a", "bc", "d", "e", system="f")], 14)
    assert tokens(example) == [[SYSTEM, 5, END, USER, 3, END, ASSISTANT, 4, END]]
    assert example.truncated


def test_a_system_message_that_fills_the_context_leaves_nothing_to_learn(settings, encoded):
    (example,) = encoded(settings("chat").task, [conversation("a", "b", system="c" * 20)], 14)
    assert tokens(example) == [[SYSTEM, *[2] * 13]] and learned(example) == [[0] * 14]
    assert example.truncated


def test_more_examples_than_are_encoded_at_once_keep_their_order(settings, encoded, letters):
    words = [f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}" for n in range(2101)]
    found = encoded(settings("entailment").task, [Labelled((word, word[::-1]), 0) for word in words])
    assert [letters.decode(example.sequences[0]) for example in found] == [word + word[::-1] for word in words]


@pytest.mark.parametrize(
    ("task", "context", "message"),
    [
        ("classification", 7, "the form needs at least 8 tokens, and the base's context has 7"),
        ("text_to_text", 8, r"task.target_tokens=6 needs at least 9 tokens, and the base's context has 8; lower it"),
        ("chat", 13, r"task.answer_tokens=6 needs at least 14 tokens, and the base's context has 13; lower it"),
    ],
)
def test_a_context_without_room_is_refused(settings, task, context, message):
    check_room(settings(task).task, context + 1)
    with pytest.raises(UserError, match=message):
        check_room(settings(task).task, context)


def test_which_labels_are_numbers(settings):
    found = {form for form in ("classification", "number", "similarity", "multiple_choice", "text_to_text", "chat")}
    assert {form for form in found if settings(form).task.is_number} == {"number", "similarity"}
    assert not settings("similarity", labels=["0", "1"], metrics=["f1"]).task.is_number
