"""A conversation kept by the library: send, regenerate, edit an earlier turn, save, and load again.

python examples/chat_session.py [MODEL_FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"

with exl.load(model) as rt:
    chat = rt.chat(system="Be brief.")
    print("1:", chat.send("My name is Mira.").text)
    reply = chat.send("What is my name?")
    print("2:", reply.text, f"({reply.reused_tokens} of {reply.prompt_tokens} prompt tokens came from the cache)")
    print("again:", chat.regenerate().text)
    print("edited:", chat.edit(0, "My name is Tom.").text)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.json"
        chat.save(path)
        again = exl.ChatSession.load(path, rt)
        print("after loading:", again.send("What is my name?").text)
