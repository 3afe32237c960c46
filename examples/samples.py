"""Several replies to one prompt: it is computed once, and each reply has a seed of its own, to be had again.

python examples/samples.py [MODEL_FOLDER]
"""

import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
prompt = [{"role": "user", "content": "Tell me a short story about a fox."}]
sampling = exl.SamplingParams(temperature=0.9, top_p=0.95, seed=10)

with exl.load(model) as rt:
    replies = rt.generate(prompt, n=4, max_tokens=30, sampling=sampling)
    for number, reply in enumerate(replies):
        print(f"seed {10 + number}: {' '.join(reply.text.split())}")
    again = rt.generate(prompt, max_tokens=30, sampling=exl.SamplingParams(temperature=0.9, top_p=0.95, seed=12))
    print("the third once more:", again.ids == replies[2].ids)
