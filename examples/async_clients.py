"""Two clients of one model at once, with asyncio: their tokens interleave, the model is shared.

python examples/async_clients.py [MODEL_FOLDER]
"""

import asyncio
import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"


async def client(rt: exl.Runtime, name: str, question: str) -> None:
    text = ""
    async for event in rt.astream([{"role": "user", "content": question}], max_tokens=60):
        if isinstance(event, exl.Text):
            text += event.text
    print(f"{name}: {text.strip()}")


async def main() -> None:
    with exl.load(model) as rt:
        await asyncio.gather(
            client(rt, "first", "What is the capital of Norway?"),
            client(rt, "second", "What is the opposite of up?"),
        )


asyncio.run(main())
