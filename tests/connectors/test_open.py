from __future__ import annotations

import pytest

from streamattn.connectors import open_sink, open_source
from streamattn.connectors.files import FileSource
from streamattn.connectors.memory import MemorySource
from streamattn.connectors.zeromq import ZmqSink, ZmqSource
from streamattn.errors import ConfigError
from streamattn.frame import Sink, Source


def protocols(source: Source, sink: Sink) -> None:
    """The type checker compares both with the contract here."""


def test_the_scheme_chooses_the_connector() -> None:
    source = open_source("zmq+sub://127.0.0.1:5555?topic=sa/in/&topic=x%20y+z&hwm=7")
    assert isinstance(source, ZmqSource)
    assert source._topics == ("sa/in/", "x y+z")
    assert source.endpoints == ("tcp://127.0.0.1:5555",)
    sink = open_sink("zmq+pub://127.0.0.1:5555,localhost:5556/?bind=true&heartbeat=0.5")
    assert isinstance(sink, ZmqSink)
    assert sink.endpoints == ("tcp://127.0.0.1:5555", "tcp://localhost:5556")
    replay = open_source("file:///tmp/x.rec?speed=inf")
    assert isinstance(replay, FileSource)
    protocols(source, sink)


def test_a_name_is_the_same_memory_connector_until_it_is_closed() -> None:
    first = open_source("memory://ticks?capacity=3")
    assert isinstance(first, MemorySource)
    assert MemorySource.named("ticks") is first
    assert open_source("memory://other") is not first


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("zmq+subb://127.0.0.1:5555", r"did you mean 'zmq\+sub'"),
        ("zmq+pub://127.0.0.1:5555", "schemes"),
        ("", "schemes"),
        ("zmq+sub://127.0.0.1:5555?topik=a", "topik.*did you mean 'topic'"),
        ("zmq+sub://127.0.0.1:5555?hwm=many", "hwm: expected a whole number, found 'many'"),
        ("zmq+sub://127.0.0.1:5555?bind=yes", "bind: expected 1 or 0, found 'yes'"),
        ("zmq+sub://127.0.0.1:5555?hwm=1&hwm=2", "hwm: expected one value, found 2"),
        ("zmq+sub://127.0.0.1:5555?bind", "expected option=value, found 'bind'"),
        ("zmq+sub://127.0.0.1:5555?decoder=x", "decoder"),
        ("zmq+sub://127.0.0.1:5555/run/x", "found both"),
        ("file://run/x.rec", "file:///absolute"),
        ("file:///x?speed=0", "speed"),
        ("file:///x?speed=nan", "speed"),
        ("memory://", "memory://name"),
        ("http://[::1", "scheme://address"),
    ],
)
def test_a_url_that_cannot_work_says_why(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_source(url)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"curve_sekret.*did you mean 'curve_secret'"):
        open_source("zmq+sub://127.0.0.1:5555", curve_sekret=b"")
    with pytest.raises(ConfigError, match="decoder"):
        open_sink("zmq+pub://127.0.0.1:5555", decoder=print)
