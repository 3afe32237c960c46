"""What the model thought: log-probabilities of the generated tokens, and of a text you give it.

python examples/logprobs.py [MODEL_FOLDER]
"""

import sys

import torch

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"

with exl.load(model) as rt:
    messages = [{"role": "user", "content": "What is the opposite of hot?"}]
    result = rt.generate(messages, max_tokens=12, sampling=exl.SamplingParams(temperature=0), logprobs=3)
    for token in result.logprobs:
        best = ", ".join(f"{rt.tokenizer.piece(i)!r} {lp:.2f}" for i, lp in token.top)
        print(f"{rt.tokenizer.piece(token.id)!r:>14} {token.logprob:.2f}   best: {best}")

    ids = rt.tokenizer.encode("Once upon a time there was a little")
    scores = torch.log_softmax(rt.logits(ids), dim=-1)  # (tokens, vocab)
    given = sum(scores[i, token].item() for i, token in enumerate(ids[1:]))
    print(f"log-probability of the text: {given:.2f}")
