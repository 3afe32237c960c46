"""Answers from a handful of notes: the note that fits the question best goes in front of it. No vectors, only words.

python examples/retrieval.py [MODEL_FOLDER]
"""

import math
import re
import sys
from collections import Counter

import exl_runtime as exl

NOTES = (
    "The capital of France is Paris.",
    "Whales are mammals. They breathe air and feed their young with milk.",
    "My name is Mira and I like tea.",
    "My dog is called Rex.",
    "Bread is made from flour, water, yeast and salt.",
)
QUESTIONS = ("What is the capital of France?", "What is my name?")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def best(question: str) -> str:
    """The note with the highest BM25 score: rare words of the question count more, long notes less."""
    notes = [Counter(words(note)) for note in NOTES]
    average = sum(note.total() for note in notes) / len(notes)

    def score(note: Counter[str]) -> float:
        total = 0.0
        for word in set(words(question)):
            having = sum(word in other for other in notes)
            rarity = math.log(1 + (len(notes) - having + 0.5) / (having + 0.5))
            count = note[word]
            total += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * note.total() / average))
        return total

    return max(NOTES, key=lambda note: score(Counter(words(note))))


with exl.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as rt:
    for question in QUESTIONS:
        note = best(question)
        reply = rt.generate(
            [{"role": "user", "content": f"{note} {question}"}],
            max_tokens=40,
            sampling=exl.SamplingParams(temperature=0),
        )
        print(f"{question}\n  note: {note}\n  answer: {reply.text.strip()}")
