"""A server that only waits, to tell what of a TTFT is the client's own: python waiting.py MILLISECONDS OUT.json

It answers completions and chats, streamed or not: the first token a fixed time after the request's last byte, the
others at once. It serves on a free port, which it prints, and on SIGTERM writes how long each request took here, in
milliseconds from its head to the first token's write, to OUT.json. Only the standard library is used.
"""

import asyncio
import json
import signal
import sys
import time


def piece(chat, text, model):
    """One event's body, of the shape that the interface has."""
    choice = {"index": 0, "finish_reason": None, "logprobs": None}
    choice |= {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "waited", "object": kind, "created": 0, "model": model, "choices": [choice]}


def whole(chat, text, model, usage):
    """An answer that is not streamed."""
    body = piece(chat, text, model) | {"usage": usage}
    choice = body["choices"][0]
    choice["finish_reason"] = "length"
    if chat:
        body["object"] = "chat.completion"
        choice["message"] = choice.pop("delta")
    return json.dumps(body).encode()


class Waiting:
    """The connections, and the times of the requests that they brought."""

    def __init__(self, wait_s):
        self.wait_s = wait_s
        self.took_ms = []

    async def serve(self, reader, writer):
        """One connection's requests, one after another."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                began = time.perf_counter()
                lines = head.decode("latin-1").split("\r\n")
                fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                await self.answer(writer, lines[0].split(" ")[1], body, began)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer, path, body, began):
        if not path.endswith("/completions"):
            # The list of models, which clients ask for before they begin; and whether it is healthy.
            names = ["tiny", *(f"lora-{number}" for number in range(16))]
            send(writer, json.dumps({"object": "list", "data": [{"id": n, "object": "model"} for n in names]}).encode())
            return
        asked = json.loads(body)
        chat = "messages" in asked
        model = asked.get("model") or "tiny"
        tokens = asked.get("max_tokens") or asked.get("max_completion_tokens") or 1
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
        await asyncio.sleep(self.wait_s - (time.perf_counter() - began))
        if not asked.get("stream"):
            answer = whole(chat, "x" * tokens, model, usage)
            self.took_ms.append((time.perf_counter() - began) * 1e3)
            send(writer, answer)
            return
        first = event(piece(chat, "x", model))
        self.took_ms.append((time.perf_counter() - began) * 1e3)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + first)
        others = [event(piece(chat, "x", model)) for _ in range(tokens - 1)]
        last = piece(chat, "", model) | {"choices": [], "usage": usage}
        writer.write(b"".join([*others, event(last), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]))


def chunk(content):
    return b"%x\r\n%s\r\n" % (len(content), content)


def event(body):
    return chunk(b"data: " + json.dumps(body).encode() + b"\n\n")


def send(writer, body):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


async def main(wait_ms, out):
    waiting = Waiting(wait_ms / 1e3)
    server = await asyncio.start_server(waiting.serve, "127.0.0.1", 0)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"serving on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", file=sys.stderr, flush=True)
    await stop.wait()
    with open(out, "w", encoding="utf-8") as file:
        json.dump(waiting.took_ms, file)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2]))
