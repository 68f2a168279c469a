"""Stop requests that arrive as signals."""

import signal


class StopSignal:
    """Records SIGINT or SIGTERM in `signal`; a second one raises KeyboardInterrupt at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._record)

    def _record(self, number: int, _: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
