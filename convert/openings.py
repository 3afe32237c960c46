"""Beginnings of texts for a model to continue: the default calibration set is sampled from the model itself.

Why openings: no text of others is shipped with the program, and what a model writes shows which activations it lives
with. From BOS alone a model keeps to its favourite subjects; one opening per register (encyclopedia, story, code,
lists, other scripts, ...) draws out the others. They are short, so that nearly every token of a row is the model's;
none ends in a space, which most tokenizers put before the next word.
"""
# ruff: noqa: RUF001  (letters of other scripts are meant)

from collections.abc import Callable, Sequence

from exl_runtime.errors import TemplateError

Message = dict[str, str]
Renderer = Callable[[Sequence[Message]], Sequence[int]]

OPENINGS: tuple[str, ...] = (
    "",  # from BOS: whatever the model likes best
    # encyclopedia, news, science, law
    "The river rises in the mountains and",
    "Copper is a metal that",
    "She was an astronomer, born in",
    "Officials said on Tuesday that the new bridge",
    "Shares of the company fell after",
    "We measured how the temperature of the samples",
    "The cell membrane controls",
    "Article 4. The tenant shall",
    # stories, dialogue, letters, opinion
    "The lighthouse keeper had not spoken to anyone since",
    "Once there was a small fox who",
    '"You\'re late," said the old woman. "',
    "ANNA: Did you hear that?\nBEN:",
    "Dear Mr. Hollis,\n\nThank you for",
    "I bought this kettle two months ago and",
    "People often ask me why",
    # instructions, lists, tables
    "To change a bicycle tyre, first",
    "Question: Why is the sky blue?\nAnswer:",
    "Lentil soup\n\nIngredients:\n- 2 onions\n-",
    "Things to pack:\n1.",
    "-",
    "# Getting started\n\n## Installation\n",
    "| Country | Capital | Population |\n|---|---|---|\n|",
    "Name,Age,City\n",
    # code
    "def read_lines(path):\n",
    "import numpy as np\n\nclass",
    "#include <stdio.h>\n\nint main(void) {\n",
    "<!DOCTYPE html>\n<html>\n<head>\n",
    '{\n  "id": 17,\n  "name": "',
    "#!/bin/sh\nset -e\n",
    "SELECT name, COUNT(*) FROM",
    "function add(a, b) {\n",
    # mathematics
    "Let $n$ be an odd integer. Then",
    "Proof. Suppose that",
    "12 + 30 = 42\n7 * 8 =",
    # other languages and scripts
    "Am nächsten Morgen ging er",
    "La ville se trouve au bord de",
    "El museo abrió sus puertas en",
    "Quando arrivò alla stazione,",
    "Segundo os moradores da aldeia,",
    "Het water in de haven was",
    "Wczoraj wieczorem na rynku",
    "Зимой в нашем городе",
    "Dün akşam eve dönerken",
    "这座城市的历史可以",
    "昨日、駅の前で",
    "오늘 아침 시장에서",
    "في صباح اليوم التالي",
    "गाँव के पास एक",
    "Ngày xưa, ở một ngôi làng",
)

_BRIEF = "You are a helpful assistant. Answer briefly."
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hi! How are you today?"},),
    ({"role": "user", "content": "Why do leaves turn red in autumn?"},),
    ({"role": "user", "content": "Write a short story about a clock that runs backwards."},),
    ({"role": "user", "content": "Give me five ideas for a rainy weekend, as a list."},),
    ({"role": "user", "content": "Write a Python function that finds the longest word in a text."},),
    ({"role": "user", "content": "A train covers 180 km in 2.5 hours. How fast is it? Show your steps."},),
    ({"role": "user", "content": "Write a polite mail to my landlord: the heating does not work."},),
    ({"role": "user", "content": "Erkläre mir in drei Sätzen, was ein Schaltjahr ist."},),
    ({"role": "user", "content": "请推荐一道简单的晚餐，并说明做法。"},),
    (
        {"role": "system", "content": _BRIEF},
        {"role": "user", "content": "What is the difference between rain and hail?"},
    ),
    (
        {"role": "system", "content": _BRIEF},
        {"role": "user", "content": "Translate into French: Where is the library?"},
    ),
    (
        {"role": "system", "content": "You are a patient teacher. Use examples."},
        {"role": "user", "content": "What is a fraction?"},
    ),
    (
        {"role": "user", "content": "I want to learn to cook. Where do I start?"},
        {"role": "assistant", "content": "Start with eggs: they are cheap and cook in minutes."},
        {"role": "user", "content": "And after that?"},
    ),
)


def chat_openings(render: Renderer) -> tuple[tuple[int, ...], ...]:
    """The ids of about a dozen chats, each up to where the model's answer begins.

    render   messages -> ids, with the header of the answer at the end; raises TemplateError

    A chat that the template refuses (many refuse a system message) is left out; without a template, so is every
    chat, and the result is empty: a base model has never seen one.
    """
    openings = []
    for messages in _CONVERSATIONS:
        try:
            openings.append(tuple(render(messages)))
        except TemplateError:
            continue
    return tuple(openings)
