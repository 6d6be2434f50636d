"""What hostile clients cost the others: python tests/clients/hostile.py [--program FILE] [--work DIR]

It starts `lora-hbm serve --emulate`, which computes nothing but keeps a profile's times, sends an ordinary request every 50 ms and tells its median and 99th percentile:
alone, and while each kind of hostile client does its worst from a process of its own. Exit status 1 if a median is
more than 10 ms from the one without them, or an ordinary request fails. Only the standard library is used.
"""

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import time
import urllib.parse

import common

ALLOWED_MS = 10.0
PACE_S = 0.05
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


async def connect(at, receive_buffer=None):
    """A connection; one that will not be read has a small buffer."""
    made = socket.socket()
    made.setblocking(False)
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(made, at)
    return made


async def drip(at, begin, byte):
    """Sends a beginning and then a byte a second."""
    loop = asyncio.get_running_loop()
    with await connect(at) as made:
        await loop.sock_sendall(made, begin)
        while True:
            await asyncio.sleep(1)
            await loop.sock_sendall(made, byte)


async def slow_head(at):
    await drip(at, HEAD + b"x-slow: ", b"a")


async def slow_body(at):
    await drip(at, HEAD + b'content-length: 5000\r\n\r\n{"prompt": "', b"a")


async def long_stream(at, read):
    """Asks for a long stream, once, and reads it or does not."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    with await connect(at, receive_buffer=None if read else 2048) as made:
        await loop.sock_sendall(made, HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        while read and b"[DONE]" not in await loop.sock_recv(made, 65536):
            pass
        await asyncio.sleep(3600)


async def reader(at):
    await long_stream(at, read=True)


async def slow_reader(at):
    await long_stream(at, read=False)


async def idle(at):
    with await connect(at):
        await asyncio.sleep(3600)


async def large_body(at):
    """A body of 1 GB, as far as it is taken; its length told or not."""
    loop = asyncio.get_running_loop()
    piece = b" " * 65536
    for told in (True, False):
        with await connect(at) as made:
            await loop.sock_sendall(made, HEAD + (b"content-length: 1000000000\r\n\r\n" if told else b"transfer-encoding: chunked\r\n\r\n"))
            for _ in range(1_000_000_000 // len(piece)):
                await loop.sock_sendall(made, piece if told else b"%x\r\n%s\r\n" % (len(piece), piece))


async def garbage(at):
    loop = asyncio.get_running_loop()
    with await connect(at) as made:
        await loop.sock_sendall(made, os.urandom(4096))
        await loop.sock_recv(made, 4096)


# These are not hostile, but 8 more sequences in the batch: whoever does not read is held against those that do.
READERS = "8 streams of 2,000 tokens, read as they come"
# Name, the client, how many at once, and how long one that was thrown out waits before it comes back.
KINDS = [
    ("200 that send a head a byte a second", slow_head, 200, 1.0),
    ("200 that send a body a byte a second", slow_body, 200, 1.0),
    (READERS, reader, 8, 1.0),
    ("the same 8 streams, of which nothing is read", slow_reader, 8, 1.0),
    ("1,000 idle connections", idle, 1000, 1.0),
    ("2 that send 1 GB bodies, one after another", large_body, 2, 0.1),
    ("10 that send 4 KB of random bytes, 100 times a second together", garbage, 10, 0.1),
]


def hostile(at, client, number, pause_s, ready, ended):
    """A process of `number` clients, each of which comes back when it was thrown out."""

    async def again():
        while True:
            with contextlib.suppress(OSError):
                await client(at)
            ended.value += 1
            await asyncio.sleep(pause_s)

    async def all_of_them():
        tasks = [asyncio.create_task(again()) for _ in range(number)]
        await asyncio.sleep(1)
        ready.set()
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())


def ordinary(at, number):
    """Times of ordinary requests, ms, each a connection of its own, and how many failed."""
    body = json.dumps({"model": "lora-1", "prompt": "word " * 40, "max_tokens": 4, "ignore_eos": True})
    times, failed = [], 0
    due = time.perf_counter()
    for _ in range(number):
        time.sleep(max(0.0, due - time.perf_counter()))
        due += PACE_S
        began = time.perf_counter()
        connection = http.client.HTTPConnection(*at, timeout=30)
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            failed += answer.status != 200
        except OSError:
            failed += 1
        connection.close()
        times.append((time.perf_counter() - began) * 1e3)
    return times, failed


def line(name, times, failed, alone_ms, ended):
    """Prints a row; true if nothing failed and the median is no further from `alone_ms` than allowed."""
    median = statistics.median(times)
    p99 = statistics.quantiles(times, n=100)[98]
    print(f"| {name} | {median:.2f} | {median - alone_ms:+.2f} | {p99:.2f} | {failed} of {len(times)} | {ended} |", flush=True)
    return failed == 0 and abs(median - alone_ms) <= ALLOWED_MS


def main():
    args = common.arguments(__doc__)
    held = []
    with common.started(common.Server(args, "hostile")) as server:
        url = urllib.parse.urlsplit(server.url)
        at = (url.hostname, url.port)
        ordinary(at, 20)
        times, failed = ordinary(at, args.requests)
        alone_ms = statistics.median(times)
        print("| hostile clients | median ms | more than without | p99 ms | ordinary requests that failed | thrown out |")
        print("| --- | --- | --- | --- | --- | --- |")
        held.append(line("none", times, failed, alone_ms, 0))
        for name, client, number, pause_s in KINDS:
            ready, ended = multiprocessing.Event(), multiprocessing.Value("q", 0)
            process = multiprocessing.Process(target=hostile, args=(at, client, number, pause_s, ready, ended), daemon=True)
            process.start()
            try:
                if not ready.wait(30):
                    raise SystemExit(f"the hostile clients did not start: {name}")
                times, failed = ordinary(at, args.requests)
                if not process.is_alive():
                    raise SystemExit(f"the hostile clients did not last: {name}")
                beside_ms = readers_ms if client is slow_reader else alone_ms
                held.append(line(name, times, failed, beside_ms, ended.value) or client is reader)
                if client is reader:
                    readers_ms = statistics.median(times)
            finally:
                process.terminate()
                process.join()
            time.sleep(1)
        times, failed = ordinary(at, args.requests)
        held.append(line("none any more", times, failed, alone_ms, 0))
        server.stop()
    common.end(held)


if __name__ == "__main__":
    main()
