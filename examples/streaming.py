"""Text as it is generated, with the events around it. Ctrl-C stops the reply, not the program.

python examples/streaming.py [MODEL_FOLDER]
"""

import sys

import exl_runtime as exl

model = sys.argv[1] if len(sys.argv) > 1 else "demo"

with exl.load(model) as rt:
    messages = [{"role": "user", "content": "Tell me a short story."}]
    stream = rt.stream(messages, max_tokens=120, sampling=exl.SamplingParams(temperature=0.7, seed=1))
    try:
        for event in stream:
            if isinstance(event, exl.Started):
                print(f"[{event.prompt_tokens} prompt tokens, {event.reused_tokens} from the cache]")
            elif isinstance(event, exl.Text):
                print(event.text, end="", flush=True)
            elif isinstance(event, exl.Finished):
                speed = event.result.generated_tokens / max(event.result.seconds_decode, 1e-9)
                print(f"\n[{event.result.stop_reason}; {speed:.0f} tokens/s]")
    except KeyboardInterrupt:
        stream.close()  # frees the pages of the request at once
        print("\n[stopped]")
