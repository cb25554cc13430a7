"""The decisions: pure, synchronous, without I/O. Events come in, effects go out, time is an argument."""
