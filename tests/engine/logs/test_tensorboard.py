"""TensorBoard's event files, read back."""

import struct

from tensorboardX.proto.event_pb2 import Event

from mdistiller.engine.logs.tensorboard import TensorBoard

METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}


def events(folder):
    """(step, tag or 'start', value) of each record in a folder of event files, parsed without TensorBoard."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                yield event.step, "start", event.session_log.status
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_resuming_hides_later_epochs_and_steps_in_tensorboard(tmp_path):
    board = TensorBoard(tmp_path, 1)
    board.step(500, {"lr": 0.5})
    board.epoch(1, {"test_acc": 3.0})
    board.step(1000, {"lr": 0.25})
    del board  # killed
    again = TensorBoard(tmp_path, 2, start_step=700)
    again.step(1000, {"lr": 0.25})
    again.epoch(2, {"test_acc": 4.0})
    again.finish({})
    folder = tmp_path / "train.events"
    assert list(events(folder)) == [(1, "start", 1), (1, "test_acc", 3.0), (2, "start", 1), (2, "test_acc", 4.0)]
    assert list(events(folder / "steps")) == [
        (1, "start", 1), (500, "step/lr", 0.5), (1000, "step/lr", 0.25), (701, "start", 1), (1000, "step/lr", 0.25),
    ]  # fmt: skip
