"""A server takes the place of another, as deploy/kubernetes has it, and no request is lost."""

import itertools
import signal
from contextlib import ExitStack

import pytest
from servers import Load, RunningServer, running_server, until

pytestmark = pytest.mark.system


class Service:
    """What a Service is to a proxy that balances requests: the servers that are ready, in turn."""

    def __init__(self) -> None:
        self._endpoints: list[RunningServer] = []
        self._turn = itertools.count()

    @property
    def url(self) -> str:
        endpoints = self._endpoints
        return endpoints[next(self._turn) % len(endpoints)].url

    def add(self, server: RunningServer) -> None:
        until(lambda: server.client.get("/ready").status_code == 200)
        self._endpoints = [*self._endpoints, server]

    def remove(self, server: RunningServer) -> None:
        self._endpoints = [other for other in self._endpoints if other is not server]


def test_no_request_is_lost_when_one_server_takes_the_place_of_another(make_checkpoint):
    service = Service()
    with ExitStack() as servers:  # they end after the load
        old = servers.enter_context(running_server(model=make_checkpoint()))
        service.add(old)
        with Load(service, ["abc", ["a", "bc", "d"]] * 4) as load:
            load.go_on()
            new = servers.enter_context(running_server(model=make_checkpoint()))
            service.add(new)
            load.go_on(4)
            service.remove(old)
            load.go_on()  # the pause of preStop: until nobody sends to the old one any more
            old.process.send_signal(signal.SIGTERM)
            assert old.process.wait(30) == 0
            load.go_on(4)
    for answers in load.answers:
        assert {answer.status_code for answer in answers} == {200}
        assert (answers[0].url.port, answers[-1].url.port) == (old.address[1], new.address[1])
