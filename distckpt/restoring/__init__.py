"""Restoring, on top of the other packages: `restorer` walks the graph, opens, matches, reads and assigns.

`restoration` holds one restore: its plan, and the values that still wait for objects. `status` is what the user gets.
"""
