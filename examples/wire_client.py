"""Speak the wire of docs/wire.md with nothing of streamattn: msgpack, NumPy and pyzmq.

streamattn run --model DIR --source "zmq+sub://127.0.0.1:5555?bind=1" --sink "zmq+pub://127.0.0.1:5556?bind=1"
python examples/wire_client.py --frames-to tcp://127.0.0.1:5555 --results-from tcp://127.0.0.1:5556 --events 1000"""

import argparse
import time

import msgpack
import numpy as np
import zmq

PATIENCE = 30.0  # seconds of silence after which the peer is given up
IN_FLIGHT = 64  # events sent and not yet answered: a PUB socket drops what its queue cannot hold, so never fill it


def connect(args: argparse.Namespace, context: zmq.Context, epoch: int) -> tuple[zmq.Socket, zmq.Socket]:
    """Return the two sockets once both ways are known to work: an early message would be lost without a trace."""
    frames = context.socket(zmq.XPUB)  # a PUB socket that can be asked who has subscribed
    frames.connect(args.frames_to)
    results = context.socket(zmq.SUB)
    results.subscribe("")  # with many streams: the engine's prefix and the stream's name
    results.connect(args.results_from)
    print(f"waiting for {args.frames_to} and {args.results_from}", flush=True)
    subscribed, end = False, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        while frames.poll(0 if subscribed else 100):
            event = frames.recv()  # 1, then the prefix that was subscribed to; or 0 and the one that was given up
            subscribed = subscribed or (event[:1] == b"\1" and f"sa/in/{args.stream}".encode().startswith(event[1:]))
        if subscribed:
            send(frames, ["c", 1, args.stream, epoch, "open", 1, 0])
        if results.poll(100) and receive(results, args.stream, epoch):
            return frames, results
    raise SystemExit(f"no answer in {PATIENCE:.0f} s: is an engine bound to {args.frames_to} and {args.results_from}?")


def send(frames: zmq.Socket, message: list) -> None:
    frames.send_multipart([f"sa/in/{message[2]}".encode(), bytes(msgpack.Packer().pack(message))])


def receive(results: zmq.Socket, stream: str, epoch: int) -> list | None:
    """Return the next message if it is a result or a reply for us, else None."""
    message = msgpack.unpackb(results.recv_multipart()[-1])
    if message[1] != 1 or message[2] not in (stream, ""):  # other streams' come on this socket too
        return None
    if message[0] == "x":
        raise SystemExit(f"{message[4]}: {message[5]}")
    return message if message[0] in "oa" and message[3] == epoch else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Send random events to an engine and print its predictions.")
    parser.add_argument("--frames-to", required=True, metavar="tcp://HOST:PORT")
    parser.add_argument("--results-from", required=True, metavar="tcp://HOST:PORT")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--stream", default="ES")
    parser.add_argument("--features", type=int, default=0, help="floats of an event, as many as the model takes")
    args = parser.parse_args()
    rng, epoch, sent, answered = np.random.default_rng(0), time.time_ns(), 0, 0
    with zmq.Context() as context:
        context.linger = 1000  # milliseconds that the last message may take to leave
        frames, results = connect(args, context, epoch)
        while answered < args.events:
            while sent < min(args.events, answered + IN_FLIGHT):
                ids = rng.integers(0, 2, 1).astype("<i4").tobytes()
                floats = rng.standard_normal(args.features).astype("<f4").tobytes() if args.features else None
                send(frames, ["e", 1, args.stream, epoch, sent, time.time_ns(), 1, ids, args.features, floats, None, 0])
                sent += 1
            if not results.poll(int(PATIENCE * 1000)):
                raise SystemExit(f"{answered} of {args.events} events answered, then silence")
            message = receive(results, args.stream, epoch)
            if message and message[0] == "o":
                answered = message[4] + message[5]
                for name, (dtype, shape, data) in message[12].items():
                    print(message[4], name, np.frombuffer(data, "<" + dtype).reshape(shape)[-1].tolist())
        send(frames, ["c", 1, args.stream, epoch, "close", 2, 0])


if __name__ == "__main__":
    main()
