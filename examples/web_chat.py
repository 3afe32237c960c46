"""A chat in the browser: one page that shows replies as they grow, and behind it a server of the standard library.

python examples/web_chat.py [MODEL_FOLDER [PORT]]        then open http://127.0.0.1:8080
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import exl_runtime as exl

PAGE = """<!doctype html><meta charset="utf-8"><title>chat</title>
<style>body{font:16px sans-serif;max-width:40em;margin:2em auto}p{white-space:pre-wrap}.user{color:#888}
input{width:100%;font:inherit;padding:.4em}</style><div id="log"></div><form><input autofocus></form><script>
const messages = [], log = document.getElementById("log"), input = document.querySelector("input")
const show = (role) => log.appendChild(Object.assign(document.createElement("p"), {className: role}))
document.querySelector("form").onsubmit = async (event) => {
  event.preventDefault()
  const text = input.value; input.value = ""
  messages.push({role: "user", content: text}); show("user").textContent = text
  const answer = await fetch("/chat", {method: "POST", body: JSON.stringify(messages)})
  const reader = answer.body.getReader(), decoder = new TextDecoder(), place = show("assistant")
  for (let part; !(part = await reader.read()).done;) place.textContent += decoder.decode(part.value, {stream: true})
  messages.push({role: "assistant", content: place.textContent})
}</script>"""


class Chat(BaseHTTPRequestHandler):
    """The page, and the replies to what it sends; `runtime` belongs to the server."""

    def do_GET(self) -> None:
        self._begin(200 if self.path == "/" else 404, "text/html; charset=utf-8")
        self.wfile.write(PAGE.encode() if self.path == "/" else b"nothing here")

    def do_POST(self) -> None:
        port = self.server.server_port
        if self.headers["Origin"] not in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
            self._begin(403, "text/plain")  # a page from elsewhere
            return
        messages = json.loads(self.rfile.read(min(int(self.headers["Content-Length"] or 0), 10**6)))
        self._begin(200, "text/plain; charset=utf-8")
        with self.server.runtime.stream(messages, max_tokens=300, overflow="drop") as events:
            for event in events:  # a browser that goes away breaks the write, and leaving the loop ends the reply
                if isinstance(event, exl.Text):
                    self.wfile.write(event.text.encode())

    def _begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()


if __name__ == "__main__":
    with exl.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as rt:
        server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8080), Chat)
        server.runtime = rt
        print(f"open http://127.0.0.1:{server.server_port} (Ctrl-C stops)", flush=True)
        server.serve_forever()
