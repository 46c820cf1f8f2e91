"""The planes of slots [..., planes, r, d]: the rows that each slot has."""

GATE, KEY, VALUE = -3, -2, -1  # counted from the end: Locas-MLP has no gate
PLANES = {"glu": 3, "mlp": 2}
