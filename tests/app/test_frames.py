import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import frames


def test_a_frame_comes_out_of_a_socket_as_it_went_in():
    ours, theirs = socket.socketpair()
    arrays = [np.arange(12, dtype=np.float32).reshape(3, 4), np.empty((0, 5), dtype=np.int32), np.array([7], dtype=np.int64)]
    frames.send(ours, {"number": 5, "task": "mean"}, arrays)
    frame = frames.receive(theirs)
    assert frame.head == {"number": 5, "task": "mean"}
    for sent, received in zip(arrays, frame.arrays, strict=True):
        np.testing.assert_array_equal(sent, received)
        assert sent.dtype == received.dtype
    ours.close()
    assert frames.receive(theirs) is None
    theirs.close()


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=4), chunk=st.integers(1, 40))
def test_frames_arrive_whole_in_whatever_pieces_they_come(sizes, chunk):
    sent = [np.arange(size, dtype=np.float32) for size in sizes]
    stream = b"".join(bytes(buffer) for array in sent for buffer in frames.dump({"n": array.size}, [array]))
    received = []
    protocol = frames.FrameProtocol(received.append, lambda: None)
    while stream:
        buffer = protocol.get_buffer(-1)
        count = min(len(buffer), chunk, len(stream))
        buffer[:count] = stream[:count]
        stream = stream[count:]
        protocol.buffer_updated(count)
    assert [frame.head["n"] for frame in received] == sizes
    for array, frame in zip(sent, received, strict=True):
        np.testing.assert_array_equal(array, frame.arrays[0])


def test_a_frame_of_many_megabytes_passes_while_the_other_side_reads():
    ours, theirs = socket.socketpair()
    matrix = np.random.default_rng(0).standard_normal((2000, 1000), dtype=np.float32)
    writer = threading.Thread(target=frames.send, args=(ours, {}, [matrix]))
    writer.start()
    np.testing.assert_array_equal(frames.receive(theirs).arrays[0], matrix)
    writer.join()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("cut", [1, 11, 20])
def test_a_side_that_goes_away_in_the_middle_of_a_frame_is_gone(cut):
    ours, theirs = socket.socketpair()
    ours.sendall(b"".join(map(bytes, frames.dump({"a": 1}, [np.ones(3)])))[:cut])
    ours.close()
    assert frames.receive(theirs) is None
    theirs.close()
