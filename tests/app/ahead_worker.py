"""The engine process with a runner that takes a batch ahead, as that of a GPU does; it computes as it launches.

A batch whose first token is PATIENT is done once the next one is launched.
"""

from collections import defaultdict
from threading import Event
from types import SimpleNamespace

from model import runner
from model.cpu import CpuRunner
from model.cuda import Pipeline

PATIENT = 1999


class AheadRunner(CpuRunner):
    ahead = 1

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lanes = 1
        self._pipeline = Pipeline()
        self._launched = defaultdict(Event)
        self._count = 0

    def __call__(self, rows, task):
        def launch():
            vectors = super(AheadRunner, self).__call__(rows, task)
            self._launched[self._count].set()
            self._count += 1
            following = self._launched[self._count]
            patient = rows[0].ids[0] == PATIENT
            return vectors, SimpleNamespace(synchronize=lambda: patient and following.wait(30))

        return self._pipeline.run(launch)

    def on_layer(self, callback) -> None:
        self._pipeline.on_device = lambda: callback(True)


if __name__ == "__main__":
    from app.worker import main

    runner.CpuRunner = AheadRunner
    main()
