"""Other engines beside ours, on the same weights, in turns: each in a process of its own that is told what to run."""
