"""The mesh, the state, the step, checkpoints, and the loop."""
