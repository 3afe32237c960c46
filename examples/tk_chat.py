"""A chat in a window, with nothing but the standard library: replies grow as they are made, Stop ends them.

python examples/tk_chat.py [MODEL_FOLDER]
"""

import queue
import sys
import threading

import exl_runtime as exl


class ChatWindow:
    """The model runs in a thread; the window takes what it says out of a queue, as Tk wants to be alone in its own."""

    def __init__(self, tk, root, chat: exl.ChatSession) -> None:
        self.root, self.chat = root, chat
        self.said: queue.Queue[str | None] = queue.Queue()
        self.thread: threading.Thread | None = None
        self.log = tk.Text(root, wrap="word", width=80, height=24)
        self.entry = tk.Entry(root)
        self.stop = tk.Button(root, text="Stop", command=chat.cancel)
        for part, where in ((self.log, "top"), (self.stop, "right"), (self.entry, "bottom")):
            part.pack(side=where, fill="both")
        self.entry.bind("<Return>", self.send)
        root.after(50, self.look)

    def send(self, event=None) -> None:
        text = self.entry.get().strip()
        if text and (self.thread is None or not self.thread.is_alive()):
            self.entry.delete(0, "end")
            self.log.insert("end", f"> {text}\n")
            self.thread = threading.Thread(target=self.reply, args=(text,), daemon=True)
            self.thread.start()

    def reply(self, text: str) -> None:
        try:
            for event in self.chat.stream(text):
                if isinstance(event, exl.Text):
                    self.said.put(event.text)
        except exl.errors.ExlError as err:
            self.said.put(f"[{err.problem}]")
        self.said.put("\n\n")

    def look(self) -> None:
        while not self.said.empty():
            self.log.insert("end", self.said.get())
            self.log.see("end")
        self.root.after(50, self.look)


if __name__ == "__main__":
    import tkinter

    with exl.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as runtime:
        window = tkinter.Tk()
        window.title(runtime.info.name)
        ChatWindow(tkinter, window, runtime.chat())
        window.mainloop()
