"""A publisher, an engine and a subscriber on ZeroMQ: three parties that in life are three processes, here in one.

Each event goes out on one topic; its prediction comes back on another, through two TCP sockets on loopback.
"""

import argparse
import asyncio
import time

import numpy as np
import torch

import streamattn
from streamattn.connectors import open_sink, open_source
from streamattn.connectors.zeromq import ZmqSink, ZmqSource

STREAM = "ES"
IN_FLIGHT = 256  # events sent and not yet answered: a PUB socket drops what its queue cannot hold


async def publish(sink: ZmqSink, ready: asyncio.Event, room: asyncio.Semaphore, epoch: int, steps: int) -> None:
    while not ready.is_set():  # whoever has not joined yet would miss the first events
        await sink.send(streamattn.Control(STREAM, epoch, "open"))
        await asyncio.sleep(0.05)
    rng = np.random.default_rng(0)
    for i in range(steps):
        await room.acquire()
        ids = rng.integers(0, 3, 1).astype(np.int32)
        features = rng.standard_normal((1, 9)).astype(np.float32)
        await sink.send(streamattn.Frame(STREAM, epoch, i, time.time_ns(), ids, features))


async def subscribe(source: ZmqSource, ready: asyncio.Event, room: asyncio.Semaphore, epoch: int, steps: int) -> None:
    answered = missing = 0
    async for deliveries in source.frames():
        for delivery in deliveries:
            message = delivery.message
            delivery.acknowledge()
            if isinstance(message, streamattn.Reply) and message.epoch == epoch:
                ready.set()  # the answer to `open`: both ways stand
            if isinstance(message, streamattn.Result):
                answered += message.num_events
                missing += message.missing
                room.release()
                if answered % 100 == 0 or answered == steps:
                    took = (message.end_ns - message.arrival_ns) / 1e6
                    print(f"event {message.sequence}: {message.heads['next'][0].round(2)}, {took:.2f} ms in the engine")
        if answered == steps:
            print(f"{answered} of {steps} events answered, {missing} missing")
            return


async def main(steps: int) -> None:
    torch.set_num_threads(1)  # a small model: more threads only wait for each other
    checkpoint = streamattn.load_checkpoint(streamattn.shipped_model("emini"))
    engine = streamattn.Engine(checkpoint.model, lanes=8, auto_open=True)
    engine.warmup()  # so that the first event pays for nothing
    ready, room, epoch = asyncio.Event(), asyncio.Semaphore(IN_FLIGHT), time.time_ns()
    free_port = ["tcp://127.0.0.1:0"]
    async with (
        ZmqSink("pub", free_port, bind=True, topic="sa/in/") as publisher,
        ZmqSource("sub", free_port, bind=True, topic=("sa/out/",)) as subscriber,
        asyncio.TaskGroup() as tasks,
    ):
        sources = [open_source(publisher.endpoints[0].replace("tcp://", "zmq+sub://") + "?topic=sa/in/")]
        sinks = [open_sink(subscriber.endpoints[0].replace("tcp://", "zmq+pub://") + "?topic=sa/out/")]
        runtime = streamattn.Runtime(engine, sources, sinks)
        tasks.create_task(runtime.run())
        tasks.create_task(publish(publisher, ready, room, epoch, steps))
        await subscribe(subscriber, ready, room, epoch, steps)
        runtime.stop()  # reads no more, answers what was accepted, returns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="events to send")
    asyncio.run(main(parser.parse_args().steps))
