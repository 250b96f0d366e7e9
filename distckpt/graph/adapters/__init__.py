"""One small module per kind of object; `registry` finds the right one."""
