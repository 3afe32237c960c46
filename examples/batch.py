"""Several prompts in one batch: they share every forward pass, and the cache of their common beginning.

python examples/batch.py [MODEL_FOLDER]
"""

import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
countries = ["France", "Italy", "Spain", "Japan"]

with exl.load(model) as rt:
    prompts = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in countries]
    results = rt.generate(prompts, max_tokens=40, sampling=exl.SamplingParams(temperature=0))
    for country, result in zip(countries, results, strict=True):
        print(f"{country}: {result.text.strip()}")
