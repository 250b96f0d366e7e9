"""A restore, as a line through the rooms below: `restorer` walks, opens, matches, reads and assigns.

`restoration` (one restore: its plan, and what of it still waits for objects), `status` (what it tells the user).
"""
