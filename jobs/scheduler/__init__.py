"""The run: a pure state machine, the Ray loop around it, and the control objects of an output."""
