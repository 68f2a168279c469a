"""Stop requests that arrive as signals."""

import signal


class StopSignal:
    """Records SIGINT and SIGTERM, so that the training loop can save before it ends.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._record)

    def _record(self, number: int, frame: object) -> None:
        del frame
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
