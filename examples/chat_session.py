"""A conversation kept by the library: branches, and a file that survives a crash at any moment.

python examples/chat_session.py [MODEL_FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"

with exl.load(model) as rt, tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "session.json"
    chat = rt.chat(system="Be brief.")
    chat.keep(path)  # from the first message on, word by word
    print("1:", chat.send("My name is Mira.").text)
    reply = chat.send("What is my name?")
    print("2:", reply.text, f"({reply.reused_tokens} of {reply.prompt_tokens} prompt tokens came from the cache)")
    print("again:", chat.regenerate().text)
    print("edited:", chat.edit(0, "My name is Tom.").text)
    for branch in chat.branches:  # nothing that was said is lost
        print(f"branch {branch.number}:", [node.turn.content for node in chat.tree.path(branch.leaf)])
    chat.goto(1)
    chat.close()

    again = exl.ChatSession.resume(path, rt)  # after a crash too; `load` leaves the file as it is
    print("after resuming:", again.send("What is my name?").text)
    again.save(Path(folder) / "snapshot.json")
    again.close()
