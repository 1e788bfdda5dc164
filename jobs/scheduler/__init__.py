"""The run: a pure state machine, the Ray loop around it, and who is in charge of an output."""
