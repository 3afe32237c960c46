"""The shortest program: load a model, complete a prompt, look at what it cost.

python examples/hello.py [MODEL_FOLDER]
"""

import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"

with exl.load(model) as rt:
    result = rt.generate(
        [{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=60,
        sampling=exl.SamplingParams(temperature=0),
    )
    print(result.text)
    print(f"[{result.stop_reason}; {result.prompt_tokens} + {result.generated_tokens} tokens]")
