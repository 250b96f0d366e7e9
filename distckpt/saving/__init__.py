"""A save, as a line through the rooms below: `saver` walks, agrees, creates, writes and commits.

`save_call` (what was asked for), `agreed_layout` (what later saves of a layout need not agree on again), `output` and
`draft` (the file on rank 0), `writer` (the shards of this rank). In the background: `background_save`, `in_flight` (the
saves that have not ended) and `overlap` (copies that are made after the call).
"""
