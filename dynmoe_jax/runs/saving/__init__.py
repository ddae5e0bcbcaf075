"""Writing of checkpoints beside the steps that go on: the pace, the copy, arrays in parts."""
