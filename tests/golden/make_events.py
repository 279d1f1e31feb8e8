"""Writes events.tfevents beside it, by TensorBoard's own writer, for test_event_file.cpp.

    pip install tensorboard && python tests/golden/make_events.py
"""
import pathlib

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

path = pathlib.Path(__file__).with_name("events.tfevents")
with open(path, "wb") as file:
    writer = RecordWriter(file)
    events = [
        Event(wall_time=1.5e9, file_version="brain.Event:2"),
        Event(wall_time=1.5e9, step=300, session_log=SessionLog(status=SessionLog.START)),
        Event(wall_time=1.5e9 + 0.25, step=350, summary=Summary(value=[
            Summary.Value(tag="loss", simple_value=0.125),
            Summary.Value(tag="learning_rate", simple_value=2e-4)])),
        Event(wall_time=1.5e9 + 1, step=70000, summary=Summary(value=[
            Summary.Value(tag="loss", simple_value=0.0)])),
    ]
    for event in events:
        writer.write(event.SerializeToString())
    writer.flush()
