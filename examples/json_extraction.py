"""A reply that is valid JSON under a schema, whatever the model would rather say. Needs `pip install llguidance`.

python examples/json_extraction.py [MODEL_FOLDER]
"""

import json
import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
schema = {
    "type": "object",
    "properties": {
        "country": {"enum": ["France", "Italy", "Spain", "Japan"]},
        "capital": {"type": "string", "maxLength": 20},
    },
    "required": ["country", "capital"],
    "additionalProperties": False,
}
question = "What is the capital of France?"

with exl.load(model) as rt:
    reply = rt.generate(
        [{"role": "user", "content": question}],
        max_tokens=100,
        sampling=exl.SamplingParams(temperature=0),
        grammar=exl.Grammar.json_schema(schema),
    )
    print("as an object:", json.loads(reply.text))
    choice = exl.Grammar.choice(["yes", "no"])
    print("as a choice:", rt.generate("Is the sky blue? Answer:", grammar=choice).text)
