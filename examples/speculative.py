"""Guessing ahead: what it saves on text that repeats itself and on text that does not. The tokens stay the same.

python examples/speculative.py [MODEL_FOLDER [DRAFT_FOLDER]]
"""

import statistics
import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
draft = sys.argv[2] if len(sys.argv) > 2 else None
names = ("Mira", "Tim", "Anna", "Ben", "Lily", "Tom", "Sara", "Max")
story = "Once upon a time there was a little fox who lived in the north. "
story += "; ".join(f"{name} has {k} red apples and an old map of the north" for k, name in enumerate(names, 2)) + ". "
cases = {  # name: prompt and sampling
    "copying": (story * 2 + story[:60], exl.SamplingParams(temperature=0, ignore_eos=True)),
    "free, greedy": ("Once upon a time", exl.SamplingParams(temperature=0)),
    "free, drawn": ("Once upon a time", exl.SamplingParams(seed=2)),
}

with exl.load(model, draft=draft, threads=1) as rt:  # threads that wait for each other blur what is compared
    for name, (prompt, sampling) in cases.items():
        ratios = []
        for turn in range(5):
            # Other first words each turn: earlier replies must not be there to guess from.
            plain, guessed = (
                rt.generate(f"{turn}. {prompt}", max_tokens=200, sampling=sampling, speculate=mode)
                for mode in ("off", "auto")
            )
            assert plain.ids == guessed.ids
            ratios.append(plain.seconds_decode / guessed.seconds_decode)
        share = f"{guessed.accepted_tokens} of {guessed.drafted_tokens} guesses came true"
        print(f"{name}: {statistics.median(ratios):.2f} times as fast, {share}")
