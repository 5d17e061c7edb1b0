"""Every error that streamattn raises on purpose.

    StreamattnError
    ├── ConfigError (ValueError)      an argument, option, pattern or configuration file that cannot work
    ├── CheckpointError (ValueError)  a checkpoint that is missing, damaged or of another model
    ├── FrameError (ValueError)       bytes or columns that are no valid message; counted, dropped, harmless to others
    ├── OverloadError                 no free lane, or a full queue under the policy `reject`
    ├── EngineError                   the engine is stopped, or a step failed
    │   └── StreamError               one stream ended with a fault; the others go on
    └── ConnectorError                a transport failed for good
        ├── ConnectError              it could not be set up: address, port, credentials
        └── SendError                 a message could not be handed to the transport

Messages read "name: expected …, found …" and, where it helps, end with what to do.
"""


class StreamattnError(Exception):
    """Base of every error raised by streamattn."""


class ConfigError(StreamattnError, ValueError):
    """An argument, option, pattern or configuration value that cannot work."""


class CheckpointError(StreamattnError, ValueError):
    """A checkpoint that is missing, damaged, or made for another model."""


class FrameError(StreamattnError, ValueError):
    """Bytes or columns that are no valid message. `code` is the wire's error code."""

    def __init__(self, message: str, code: str = "bad_frame") -> None:
        super().__init__(message)
        self.code = code


class OverloadError(StreamattnError):
    """No lane is free, or a queue is full and its policy is `reject`."""


class EngineError(StreamattnError):
    """The engine is stopped, or a step failed."""


class StreamError(EngineError):
    """One stream ended with a fault. `stream` names it; other streams are unharmed."""

    def __init__(self, stream: str, message: str) -> None:
        super().__init__(f"stream {stream!r}: {message}")
        self.stream = stream


class ConnectorError(StreamattnError):
    """A transport failed for good."""


class ConnectError(ConnectorError):
    """A transport could not be set up: wrong address, port in use, bad credentials."""


class SendError(ConnectorError):
    """A message could not be handed to the transport."""
