"""A server for several programs, and a client: the official `openai` package, talking to `exl serve`.

Here both run in one program. Usually the server has a terminal of its own (`exl serve MODEL`), and every program that
speaks OpenAI's API can use it: base_url http://127.0.0.1:8000/v1, any key.

python examples/server_client.py [MODEL_FOLDER]        needs: pip install 'exl-runtime[server]' openai
"""

import re
import subprocess
import sys

from openai import OpenAI

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
command = [sys.executable, "-m", "exl_runtime", "serve", model, "--port", "0", "--name", "local", "--quiet"]

with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
    try:
        for line in server.stderr:  # the line that says where it listens
            if found := re.search(r"http://\S+", line):
                break
        else:
            sys.exit("the server did not start")
        client = OpenAI(base_url=found.group(), api_key="any")
        messages = [{"role": "user", "content": "What is the capital of Norway?"}]

        reply = client.chat.completions.create(model="local", messages=messages, temperature=0)
        print("whole:   ", reply.choices[0].message.content)

        print("streamed: ", end="")
        for chunk in client.chat.completions.create(model="local", messages=messages, temperature=0, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print(f"\nagain:    {reply.usage.prompt_tokens} tokens in, {reply.usage.completion_tokens} out")
    finally:
        server.terminate()
