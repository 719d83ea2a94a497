"""Topeka's catalogue, sandboxes, reports and the command `topeka`."""
