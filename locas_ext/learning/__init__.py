"""How a memory learns: settings, the loop over chunks, the step, the updates, writing."""
